"""A resumed run is the same as an uninterrupted run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat.continued_checkpoint import ContinuedCheckpoint
from tests.conftest import Road, Train
from tests.quantization.networks import SmallModule, loader, trainer_with

pytestmark = pytest.mark.slow

# Keep the checkpoint of every epoch, because `last` is overwritten.
EVERY_EPOCH = (
    "+callbacks.every={_target_: pytorch_lightning.callbacks.ModelCheckpoint, save_top_k: -1, "
    "monitor: train/loss, save_on_train_epoch_end: true, auto_insert_metric_name: false, "
    "dirpath: %s, filename: '{epoch}'}"
)


@pytest.mark.parametrize("stage", ["fp32", "qat"])
def test_same_weights_and_scales_as_without_the_break(
    stage: str, train: Train, road: Road, tmp_path: Path
) -> None:
    args = [
        "data=digits",
        f"stage={stage}",
        "trainer.max_epochs=3",
        "trainer.limit_train_batches=8",
        "latency_seconds=0",
        "export_onnx=false",
        f"output_dir={road.output_dir if stage == 'qat' else tmp_path}",
    ]
    if stage == "qat":  # the break after epoch 1 is between two freezes
        args += [
            "callbacks.result.freeze_observer_epoch=1",
            "callbacks.result.freeze_batch_norm_epoch=2",
        ]
    whole, resumed = f"hydra.run.dir={tmp_path}/whole", f"hydra.run.dir={tmp_path}/resumed"
    assert train(*args, whole, EVERY_EPOCH % (tmp_path / "epochs"))[0] == 0
    broken_off = tmp_path / "epochs" / "1.ckpt"
    assert train(*args, resumed, f"ckpt_path={broken_off}")[0] == 0

    for file in ("last.ckpt", "best.ckpt"):
        states = [
            torch.load(tmp_path / run / "checkpoints" / file, weights_only=True)["state_dict"]
            for run in ("whole", "resumed")
        ]
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), (file, name)
    metrics = [
        json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "resumed")
    ]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"]


def test_a_run_is_not_continued_with_other_weights_than_it_began_with(
    train: Train, road: Road, tmp_path: Path
) -> None:
    weights, run = tmp_path / "fp32.ckpt", tmp_path / "run"
    shutil.copyfile(road.fp32_ckpt, weights)
    args = ["data=digits", "stage=qat", "trainer.limit_train_batches=2", f"fp32_ckpt={weights}"]
    args += [
        "latency_seconds=0",
        "export_onnx=false",
        "trainer.max_epochs=1",
        f"output_dir={tmp_path}",
    ]
    assert train(*args, f"hydra.run.dir={run}")[0] == 0
    checkpoint = torch.load(weights, weights_only=True)
    for x in checkpoint["state_dict"].values():
        x += 1
    torch.save(checkpoint, weights)
    goes_on = [f"hydra.run.dir={tmp_path}/on", f"ckpt_path={run}/checkpoints/last.ckpt"]
    status, printed = train(*args, *goes_on)
    assert status == 2, printed
    assert f"{weights} holds other weights than when this run began" in printed
    shutil.copyfile(road.fp32_ckpt, weights)
    status, printed = train(*args, *goes_on)
    assert status == 0, printed


class Scripted(SmallModule):
    """A module whose validation accuracies are known in advance."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", (0.5, 0.9, 0.6, 0.7)[self.current_epoch])


def fit_scripted(
    folder: Path, max_epochs: int, ckpt_path: Path | None = None
) -> ContinuedCheckpoint:
    best = ContinuedCheckpoint(folder, "best", "val/accuracy", mode="max")
    last = ContinuedCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer = trainer_with(best, last, folder=folder, max_epochs=max_epochs)
    trainer.fit(Scripted(), loader(), loader(), ckpt_path=ckpt_path, weights_only=True)
    return best


@pytest.mark.parametrize("continued_in", ["elsewhere", "moved"])
@pytest.mark.parametrize("meanwhile", ["there", "moved", "another run in its place"])
def test_the_best_epoch_before_the_break_stays_the_best(
    meanwhile: str, continued_in: str, tmp_path: Path
) -> None:
    fit_scripted(tmp_path / "before", 2)
    expected = (tmp_path / "before" / "best.ckpt").read_bytes()
    shutil.copytree(tmp_path / "before", tmp_path / "moved")
    if meanwhile != "there":
        shutil.rmtree(tmp_path / "before")
    if meanwhile == "another run in its place":
        fit_scripted(tmp_path / "before", 1)
    after = fit_scripted(tmp_path / continued_in, 4, tmp_path / "moved" / "last.ckpt")
    assert after.best_model_score is not None
    assert after.best_model_score.item() == pytest.approx(0.9)
    assert after.best_model_path == str(tmp_path / continued_in / "best.ckpt")
    assert (tmp_path / continued_in / "best.ckpt").read_bytes() == expected


def test_a_best_checkpoint_that_is_gone_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_scripted(tmp_path / "before", 2)
    (tmp_path / "before" / "best.ckpt").unlink()
    after = fit_scripted(tmp_path / "after", 4, tmp_path / "before" / "last.ckpt")
    assert after.best_model_score is not None
    assert after.best_model_score.item() == pytest.approx(0.7)
    assert "best.ckpt is missing or was replaced" in caplog.text


def test_what_is_continued_behind_its_last_epoch_has_its_checkpoint(tmp_path: Path) -> None:
    for folder, ckpt_path in (("before", None), ("after", tmp_path / "before" / "last.ckpt")):
        last = ContinuedCheckpoint(tmp_path / folder, "last", save_on_train_epoch_end=True)
        trainer = trainer_with(last, folder=tmp_path / folder, max_epochs=1)
        trainer.fit(SmallModule(), loader(), ckpt_path=ckpt_path, weights_only=True)
    files = [tmp_path / folder / "last.ckpt" for folder in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
