"""Two processes on the CPU have the same network and one run folder, and leave no other files."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_qat import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
    UserError,
    processes,
)
from tests.conftest import TRAIN, Train
from tests.faults.commands import LONGEST
from tests.quantization.ddp_fit import continue_frozen, fit
from tests.test_configs import composed

pytestmark = pytest.mark.slow

QUICK = (
    "trainer=ddp_cpu",
    "data=digits",
    "model=resnet18_imagenet_stem",
    "trainer.limit_train_batches=2",
    "recipe.fp32.epochs=1",
    "recipe.qat.epochs=1",
    "latency_seconds=0",
    "export_onnx=false",
)


OF_AN_FP32_RUN = {
    ".hydra",
    ".lock",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "csv/hparams.yaml",
    "csv/metrics.csv",
    "metrics.json",
    "report.html",
    "tensorboard/events",
    "tensorboard/hparams.yaml",
    "train.log",
}


class MistakeOn(pl.Callback):
    """Raise a user's mistake on some processes only."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_rank in self.ranks:
            raise UserError("planted mistake")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of two processes, and the checkpoint that one of the fits started from."""
    folder = tmp_path_factory.mktemp("ddp")
    checkpoint = ModelCheckpoint(folder, "epoch_0")
    fit(QuantizationAwareTraining(), folder, batch_size=16, max_epochs=1, also=(checkpoint,))
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantization.ddp_fit", str(folder)],
        cwd=TRAIN.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank_{rank}.pt") for rank in (0, 1)]


def test_frozen_two_processes_train_as_one_with_twice_the_batch(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    one = continue_frozen(folder, batch_size=16)
    losses = [
        sum(both) / 2 for both in zip(*(rank["frozen"]["losses"] for rank in ranks), strict=True)
    ]
    assert len(losses) == 8
    assert losses == pytest.approx(one["losses"], rel=1e-4)
    for name, x in one["state"].items():
        torch.testing.assert_close(ranks[0]["frozen"]["state"][name], x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["frozen", "qat", "lsq", "ptq"])
def test_all_processes_end_with_the_same_weights_scales_and_int8_model(
    ranks: list[dict[str, Any]], name: str
) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["losses"] != second["losses"], "the processes have seen the same images"
    assert_equal(first["state"], second["state"])
    assert torch.equal(first["logits"], second["logits"])


def test_all_processes_validate_the_same_network(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ptq"]["validated"] for rank in ranks)
    assert first
    assert_equal(first, second)


def test_the_statistics_of_the_first_process_count(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    its_images = fit(PostTrainingQuantization(), folder, batch_size=8, max_epochs=1, every=2)
    assert_equal(ranks[0]["ptq"]["state"], its_images["state"])


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["trainer=ddp_cpu"], True),
        (["trainer=ddp"], True),
        (["trainer=ddp_cpu", "trainer.devices=1"], True),  # its port would stay in the environment
        (["trainer=cpu", "trainer.devices=2"], True),
        (["trainer=cpu"], False),
        (["trainer=auto"], False),
    ],
)
def test_a_job_has_its_own_processes_where_lightning_would_start_some(
    overrides: list[str], wanted: bool
) -> None:
    assert processes.wanted(composed(*overrides)) == wanted


def test_a_single_run_leaves_one_folder_with_one_of_everything(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a SLURM job of one task must give the same result
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    before = dict(os.environ)
    status, printed = train(*QUICK, f"output_dir={tmp_path}")
    assert status == 0, printed
    (run,) = tmp_path.glob("runs/*")
    assert left_in(run) == OF_AN_FP32_RUN
    assert len(list(run.glob("tensorboard/events*"))) == 1
    assert printed.count("test accuracy") == 1
    assert dict(os.environ) == before
    assert not processes_of(tmp_path)


def test_the_whole_road_as_a_multirun(train: Train, tmp_path: Path) -> None:
    status, printed = train("-m", "stage=fp32,ptq,qat", *QUICK, f"output_dir={tmp_path}")
    assert status == 0, printed
    assert [row["stage"] for row in rows_of(tmp_path)] == ["fp32", "ptq", "qat"]
    assert len(list(tmp_path.glob("multiruns/*/*/metrics.json"))) == 3
    assert len(list(tmp_path.glob("multiruns/*/*/train.log"))) == 3
    assert len(list(tmp_path.glob("**/.hydra"))) == 3
    assert not list(tmp_path.glob("runs/*"))
    for stage in ("ptq", "qat"):
        (file,) = tmp_path.glob(f"multiruns/*/*-{stage}-*/metrics.json")
        assert json.loads(file.read_text())["agreement"]["int8_vs_fake_quant"] >= 0.95
        assert file.with_name("model_int8.ts").exists()


def test_a_mistake_costs_its_own_job_only_whichever_process_notices(
    train: Train, tmp_path: Path
) -> None:
    planted = "{_target_: tests.test_ddp.MistakeOn, ranks: %s}"
    status, printed = train(
        "-m",
        *QUICK,
        f"+callbacks.planted={planted % '[1]'},{planted % '[0,1]'},null",
        f"output_dir={tmp_path}/an output folder",
    )
    assert status == 2, printed
    assert [row["status"] for row in rows_of(tmp_path / "an output folder")] == ["2", "2", "0"]
    failures = list(tmp_path.glob("*/multiruns/*/*/failure.json"))
    assert [json.loads(path.read_text())["message"] for path in failures] == ["planted mistake"] * 2
    assert printed.count("[ERROR] planted mistake") == 2
    assert "Traceback" not in printed
    assert len(list(tmp_path.glob("*/multiruns/*/*/metrics.json"))) == 1
    assert not processes_of(tmp_path)


def test_no_process_outlives_the_one_that_was_started(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), *QUICK, "recipe.fp32.epochs=1000"]
    with subprocess.Popen(
        [*command, f"output_dir={tmp_path}"], stdout=subprocess.DEVNULL, cwd=TRAIN.parent
    ) as started:
        deadline = time.monotonic() + LONGEST
        while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):  # both are training
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(processes_of(tmp_path, patience=0)) == 3
        started.send_signal(signal.SIGKILL)
    assert not processes_of(tmp_path)


def left_in(run: Path) -> set[str]:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    names = {".hydra" if name.startswith(".hydra/") else name for name in names}
    return {"tensorboard/events" if "tfevents" in name else name for name in names}


def rows_of(output_dir: Path) -> list[dict[str, str]]:
    (file,) = output_dir.glob("multiruns/*/sweep.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def processes_of(output_dir: Path, patience: float = 10) -> list[str]:
    """Return the command lines that contain the folder, after a wait for their end."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = file.read_text().replace("\0", " ")
            except OSError:  # it has ended since
                continue
            if str(output_dir) in command and file.parent.name != str(os.getpid()):
                found.append(command)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
