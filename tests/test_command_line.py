"""Help, exit statuses, and the effect of one failed job on the others."""

import csv
import json
import time
from pathlib import Path

import pytest

from tests.conftest import Train, run_train

QUICK = (
    "data=digits",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "latency_seconds=0",
)


@pytest.mark.alone
def test_help_reads_well_and_answers_in_two_seconds() -> None:
    start = time.perf_counter()
    done = run_train("--help")
    assert time.perf_counter() - start < 2
    assert done.returncode == 0
    for word in ("stage: fp32, ptq, qat", "data: cifar10, digits, folder", "resume=true", "seed="):
        assert word in done.stdout
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("qconfig: ")) <= 100


def test_a_sweep_that_hydra_refuses_ends_with_2(train: Train) -> None:
    status, printed = train("-m", "stage=fp32,fp23")
    assert status == 2
    assert "Traceback" not in printed
    for word in ("stage/fp23", "fp32"):
        assert word in printed


@pytest.mark.slow
def test_a_failed_job_is_a_row_and_does_not_stop_the_rest(train: Train, tmp_path: Path) -> None:
    status, printed = train("-m", *QUICK, "data.val_size=1437,144", f"output_dir={tmp_path}")
    assert status == 2
    (file,) = tmp_path.glob("multiruns/*/sweep.csv")
    with file.open() as lines:
        failed, done = csv.DictReader(lines)
    assert failed["status"] == "2"
    assert "val_size=1437" in failed["message"]
    assert done["status"] == "0"
    assert float(done["accuracy.fp32"]) > 0
    assert "val_size=1437" in printed[printed.index("stage") :]


def test_a_fault_of_ours_ends_with_1_and_its_traceback_in_the_log(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise TypeError("planted")

    monkeypatch.setattr("lightning_qat.data.DigitsDataModule.load", broken)
    status, _ = train(*QUICK, f"output_dir={tmp_path}")
    assert status == 1
    (log,) = tmp_path.glob("runs/*/train.log")
    assert "Traceback" in log.read_text()
    assert "planted" in log.read_text()


def test_the_worst_status_of_a_multirun_is_ours(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise TypeError("planted")

    monkeypatch.setattr("lightning_qat.data.DigitsDataModule.load", broken)
    status, _ = train("-m", *QUICK, "data.batch_size=0,32,-1", f"output_dir={tmp_path}")
    assert status == 1
    failures = sorted(tmp_path.glob("multiruns/*/*/failure.json"))
    assert [json.loads(path.read_text())["status"] for path in failures] == [2, 1, 2]


@pytest.mark.slow
def test_a_run_that_succeeds_clears_the_failure_of_an_earlier_one(
    train: Train, tmp_path: Path
) -> None:
    here = f"hydra.run.dir={tmp_path}/run"
    assert train(*QUICK, here, "data.batch_size=0")[0] == 2
    assert (tmp_path / "run" / "failure.json").exists()
    assert train(*QUICK, here, "+note=${seed}")[0] == 0
    assert not (tmp_path / "run" / "failure.json").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "+note=${seed}" in metrics["command"]
