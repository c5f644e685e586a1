"""Interrupted sweeps and runs that are resumed, and invalid sweeps."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_qat import cli, resume
from lightning_qat.errors import UserError
from tests.conftest import TRAIN, Road, Train, run_train

QUICK = ("data=digits", "trainer=cpu", "trainer.limit_train_batches=2", "latency_seconds=0")


class Killed(pl.Callback):
    """Kill the process at the start of the second epoch of seed 1, if a file orders it."""

    def __init__(self, order: str) -> None:
        self.order = Path(order)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Kill the process. The first epoch is in last.ckpt at this time."""
        seed, epoch = os.environ["PL_GLOBAL_SEED"], trainer.current_epoch
        if (seed, epoch) == ("1", 1) and self.order.exists():
            os.kill(os.getpid(), signal.SIGKILL)


def state(folder: Path) -> dict[str, int]:
    """Return the time of writing of each file below the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(train: Train, tmp_path: Path) -> None:
    sweep, order = tmp_path / "sweep", tmp_path / "kill"
    order.touch()
    command = [
        "-m",
        *QUICK,
        "trainer.max_epochs=2",
        "seed=0,1",
        "data.batch_size=32,0",
        f"output_dir={tmp_path}/out",
        f"+callbacks.killed={{_target_: {__name__}.Killed, order: {order}}}",
        f"hydra.sweep.dir={sweep}",
        "resume=true",  # a script may always use it
    ]
    killed = run_train(*command, PYTHONPATH=f"{TRAIN.parent}:{os.environ.get('PYTHONPATH', '')}")
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    order.unlink()
    finished, failed, broken_off, reused = (sweep / f"{job}-fp32-x86" for job in range(4))
    assert not (broken_off / "metrics.json").exists()
    curves = (broken_off / "csv" / "metrics.csv").read_text()
    assert "val/accuracy" in curves
    shutil.copytree(finished, reused)  # of another job: not a result of this job
    before = state(sweep)

    status, printed = train(*command, "hydra.verbose=false")  # this argument makes no other sweep

    assert status == 2
    assert printed.count("is finished: skipped") == 1
    after = state(sweep)
    for name in ("metrics.json", "report.html", "checkpoints/last.ckpt", "csv/metrics.csv"):
        assert after[str(finished / name)] == before[str(finished / name)]
    assert after[str(failed / "failure.json")] > before[str(failed / "failure.json")]
    assert f"goes on from {broken_off}/checkpoints/last.ckpt" in printed
    assert "Restored all states" in printed
    assert (broken_off / "csv" / "metrics.csv").read_text().startswith(curves)
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["0", "2", "0", "2"]
    assert [row["epochs"] for row in rows] == ["2", "", "2", ""]


def planted(file: Path, *overrides: str) -> None:
    file.parent.mkdir(parents=True)
    if file.name == "metrics.json":
        content = {"status": 0, "command": " ".join(["python", "train.py", *overrides])}
        file.write_text(json.dumps(content))
    else:
        torch.save({"callbacks": {"MadeWith": {"overrides": list(overrides)}}}, file)


@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
@pytest.mark.parametrize("file", ["metrics.json", "checkpoints/last.ckpt"])
def test_two_jobs_of_a_sweep_do_not_share_a_folder(
    file: str, trainer: str, train: Train, tmp_path: Path
) -> None:
    planted(tmp_path / "one" / file, "seed=0")
    before = (tmp_path / "one" / file).read_bytes()
    folders = (f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=one")
    status, printed = train("-m", *QUICK, f"trainer={trainer}", "seed=1", *folders)
    assert status == 2
    assert "there seed=0" in printed
    assert "hydra.job.num" in printed
    assert (tmp_path / "one" / file).read_bytes() == before


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("hydra.sweep.subdir=a/b", "directly in the folder of the sweep"),
        ("hydra.sweep.subdir=..", "directly in the folder of the sweep"),
        ("hydra.output_subdir=null", "know its jobs by .hydra/"),
    ],
)
def test_jobs_that_a_report_would_not_find_do_not_begin(
    argument: str, words: str, train: Train, tmp_path: Path
) -> None:
    status, printed = train("-m", *QUICK, f"hydra.sweep.dir={tmp_path}/sweep", argument)
    assert status == 2
    assert words in printed
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_search_that_takes_another_course_overwrites_nothing(tmp_path: Path) -> None:
    planted(tmp_path / "3" / "metrics.json", "seed=0")
    hydra: Any = OmegaConf.create(
        {
            "mode": RunMode.MULTIRUN,
            "runtime": {"output_dir": f"{tmp_path}/3"},
            "sweep": {"dir": f"{tmp_path}"},
            "overrides": {"task": ["seed=1"]},
        }
    )
    with pytest.raises(UserError, match=r"there seed=0, here seed=1.*suggests other values"):
        resume.refuse_shared_folder(OmegaConf.create({"resume": True}), hydra)


def test_no_job_goes_on_from_a_checkpoint_of_another_or_a_damaged_one(
    train: Train, tmp_path: Path
) -> None:
    last = [tmp_path / f"{job}-fp32-x86" / "checkpoints" / "last.ckpt" for job in (0, 1)]
    planted(last[0], "seed=5")
    last[1].parent.mkdir(parents=True)
    last[1].write_bytes(b"half of a checkpoint")
    status, printed = train(
        *("-m", *QUICK, "data.batch_size=0,-1", f"hydra.sweep.dir={tmp_path}", "resume=true")
    )
    assert status == 2
    assert "goes on" not in printed
    assert printed.count("starts again") == 1
    assert "batch_size=0" in printed
    assert "batch_size=-1" in printed


SAME = ("stage=fp32,ptq,qat", "data=digits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (SAME, ["holds a sweep already", "resume=true", "hydra.sweep.dir="]),
        ((*SAME, "seed=1", "resume=true"), ["another sweep", "here seed=1"]),
        (("stage=ptq", "data=digits", "resume=true"), ["there stage=fp32,ptq,qat, here stage=ptq"]),
        (("data=digits", "stage=fp32,ptq,qat", "resume=true"), ["another order"]),
        ((*SAME, "resume=true", "hydra.sweep.subdir=${seed}"), ["here hydra.sweep.subdir=${seed}"]),
    ],
)
def test_the_folder_of_another_sweep_is_left_alone(
    args: tuple[str, ...], words: list[str], train: Train, road: Road
) -> None:
    sweep = road.job("fp32").parent
    before = state(sweep)
    status, printed = train(
        "-m", *args, f"output_dir={road.output_dir}", f"hydra.sweep.dir={sweep}"
    )
    assert status == 2
    assert state(sweep) == before
    for word in words:
        assert word in printed


def test_jobs_that_no_sweep_has_left_are_not_resumed(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "hydra.yaml").touch()
    status, printed = train("-m", *QUICK, f"hydra.sweep.dir={tmp_path}", "resume=true")
    assert status == 2
    assert "holds jobs but no arguments.json" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "status", "word"),
    [([], 0, "is finished"), (["seed=1"], 2, "holds another run: there none of it, here seed=1")],
)
def test_a_finished_run_is_not_run_again(
    more: list[str], status: int, word: str, train: Train, road: Road
) -> None:
    run = road.job("ptq")
    before = state(run)
    command = json.loads((run / "metrics.json").read_text())["command"].split()[2:]
    ended = train(*reversed(command), *more, f"hydra.run.dir={run}", "resume=true")
    assert ended[0] == status
    assert word in ended[1]
    assert state(run) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-m", "qconfig="], ["qconfig", "x86"]),
        (["-m", "stage="], ["stage", "fp32"]),
        (["-m", "qconfig=glob(zzz*)"], ["qconfig=glob(zzz*)", "no job"]),
        (["-m", "seed=range(3,3)"], ["seed=range(3,3)", "no job"]),
        (["-m", "resume=true"], ["named by the time", "hydra.sweep.dir=FOLDER"]),
        (["resume=true"], ["named by the time", "hydra.run.dir=FOLDER"]),
        (["-m", "resume=yes please"], ["resume='yes please'", "true or false"]),
        (["resume=2"], ["resume=2", "true or false"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    args: list[str], words: list[str], train: Train, tmp_path: Path
) -> None:
    status, printed = train(*args, "data=digits", f"output_dir={tmp_path}/out")
    assert status == 2
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()
    for word in words:
        assert word in printed


@pytest.mark.parametrize(
    ("change", "finished"),
    [
        ({}, True),
        ({"metrics.json": {"status": 0, "command": "python train.py resume=true seed=1"}}, True),
        ({"metrics.json": {"status": 0, "command": "python train.py launcher=ray seed=1"}}, True),
        ({"metrics.json": {"status": 0, "command": "python train.py seed=2"}}, False),
        ({"metrics.json": {"status": 1, "command": "python train.py seed=1"}}, False),
        ({"report.html": None}, False),  # killed before it was written
        ({"failure.json": {"status": 1, "message": "no report"}}, False),
    ],
)
def test_finished_is_the_same_job_with_all_its_files(
    change: dict[str, Any], finished: bool, tmp_path: Path
) -> None:
    metrics = {"status": 0, "command": "python train.py seed=1"}
    for name, content in ({"metrics.json": metrics, "report.html": ""} | change).items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert resume.is_finished(tmp_path, ["seed=1"]) is finished


@pytest.mark.parametrize("accuracy", [0.75, None], ids=["validated", "val_size=0"])
def test_a_skipped_job_returns_its_validation_accuracy(
    accuracy: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: dict[str, Any] = {"status": 0, "command": "python train.py seed=1"}
    if accuracy is not None:
        metrics["validation"] = {"accuracy": {"int8": accuracy}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "report.html").touch()
    hydra = OmegaConf.create(
        {
            "mode": RunMode.MULTIRUN,
            "runtime": {"output_dir": str(tmp_path)},
            "overrides": {"task": ["seed=1"]},
        }
    )
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)

    @cli.job
    def task(cfg: DictConfig) -> float:
        raise AssertionError("not skipped")

    assert task(OmegaConf.create({"resume": True})) == accuracy
