"""A run that was broken off and continued is the run that was not."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Road, Train

pytestmark = pytest.mark.slow

# keeps the checkpoint of every epoch, which `last` overwrites
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
        f"output_dir={road.output_dir if stage == 'qat' else tmp_path}",
    ]
    if stage == "qat":  # a freeze on either side of the break
        args += [
            "callbacks.result.freeze_observer_epoch=1",
            "callbacks.result.freeze_batch_norm_epoch=2",
        ]
    whole, resumed = f"hydra.run.dir={tmp_path}/whole", f"hydra.run.dir={tmp_path}/resumed"
    assert train(*args, whole, EVERY_EPOCH % (tmp_path / "epochs"))[0] == 0
    broken_off = tmp_path / "epochs" / "0.ckpt"
    assert train(*args, resumed, f"ckpt_path={broken_off}")[0] == 0

    states = [
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "resumed")
    ]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
