"""Processes that torchrun or srun started are one run, and report a mistake once."""

import csv
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_qat import processes
from tests.conftest import TRAIN, Train
from tests.test_configs import composed
from tests.test_ddp import OF_AN_FP32_RUN, QUICK, left_in

# The variables of each task of `srun --ntasks-per-node=2`.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
LEARNING_RATE = 0.015
COMMAND = (
    *QUICK,
    "trainer.log_every_n_steps=1",
    "model.milestones=[9]",  # a constant rate before that
    f"model.learning_rate={LEARNING_RATE}",
)


def torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(TRAIN), *args], capture_output=True, text=True, cwd=TRAIN.parent
    )


def srun(*args: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(TRAIN), *args]
    started = []
    for rank in ("0", "1"):
        task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=TRAIN.parent,
                env=os.environ | SRUN | task | {"OMP_NUM_THREADS": "1"},  # as torchrun sets it
            )
        )
    return [
        subprocess.CompletedProcess(command, process.wait(), *output)
        for process, output in [(process, process.communicate()) for process in started]
    ]


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the output folder of a run, and its printed output."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = torchrun(*COMMAND, f"output_dir={folder}", f"hydra.run.dir={folder}/runs/one")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture
def as_rank_1(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process the second task of srun, after the first task has ended."""
    for name, value in (SRUN | {"SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "FIRST_SPEAKS_WITHIN", 0)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_torchrun_leaves_one_folder_with_one_of_everything(by_torchrun: tuple[Path, str]) -> None:
    folder, printed = by_torchrun
    assert left_in(folder / "runs" / "one") == OF_AN_FP32_RUN
    assert len(list(folder.glob("runs/one/tensorboard/events*"))) == 1
    assert printed.count("test accuracy") == 1
    assert printed.count("Starting with 2 processes") == 1
    log = (folder / "runs" / "one" / "train.log").read_text()
    assert log.count("Starting with 2 processes") == 1


@pytest.mark.slow
def test_two_processes_train_with_twice_the_learning_rate(by_torchrun: tuple[Path, str]) -> None:
    with (by_torchrun[0] / "runs" / "one" / "csv" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    (name, *_) = [name for name in rows[0] if name.startswith("lr-")]
    rates = [float(row[name]) for row in rows if row[name]]
    assert rates == pytest.approx([2 * LEARNING_RATE] * len(rates))
    assert rates


@pytest.mark.slow
def test_tasks_of_srun_train_what_torchruns_processes_train(
    by_torchrun: tuple[Path, str], tmp_path: Path
) -> None:
    first, second = srun(*COMMAND, f"output_dir={tmp_path}", f"hydra.run.dir={tmp_path}/runs/one")
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + first.stderr
    assert first.stdout.count("test accuracy") == 1
    assert second.stdout == ""
    assert left_in(tmp_path / "runs" / "one") == left_in(by_torchrun[0] / "runs" / "one")
    theirs, ours = (
        torch.load(next(folder.glob("fp32/*.ckpt")))["state_dict"]
        for folder in (by_torchrun[0], tmp_path)
    )
    assert not [name for name in theirs if not torch.equal(theirs[name], ours[name])]


@pytest.mark.slow
def test_a_mistake_in_all_processes_is_told_once(tmp_path: Path) -> None:
    done = torchrun(
        *QUICK, "stage=qat", f"output_dir={tmp_path}", f"hydra.run.dir={tmp_path}/runs/one"
    )
    assert done.returncode == 1  # the status of torchrun
    assert (done.stdout + done.stderr).count("there is no checkpoint") == 1
    assert json.loads((tmp_path / "runs/one/failure.json").read_text())["status"] == 2


def test_a_mistake_that_only_another_process_notices_is_told_by_it(
    as_rank_1: None, train: Train, tmp_path: Path
) -> None:
    status, printed = train(*QUICK, "data.batch_size=0", f"hydra.run.dir={tmp_path}/run")
    assert status == 2
    assert printed.count("batch_size=0") == 1
    assert "batch_size=0" in json.loads((tmp_path / "run" / "failure.json").read_text())["message"]
    assert not (tmp_path / "run" / ".hydra").exists()  # the first process did not write it


def test_a_process_waits_for_the_first_and_says_nothing_of_what_it_has_told(
    as_rank_1: None, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failure = {"status": 2, "message": "told already"}

    def first_speaks(seconds: float) -> None:
        (tmp_path / "failure.json").write_text(json.dumps(failure))

    monkeypatch.setattr("lightning_qat.processes.time.sleep", first_speaks)
    status, printed = train(*QUICK, "data.batch_size=0", f"hydra.run.dir={tmp_path}")
    assert (status, printed) == (2, "")
    assert json.loads((tmp_path / "failure.json").read_text()) == failure


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trainer=ddp_cpu"], "add hydra.run.dir="),
        (["trainer=ddp_cpu", "hydra.run.dir=outputs/runs/${now:%M}"], "add hydra.run.dir="),
        (["-m", "trainer=ddp_cpu"], "leave -m out"),
        (["trainer=cpu", "hydra.run.dir=outputs/runs/one"], "add trainer=ddp"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_with_what_to_do(
    environment: dict[str, str],
    args: list[str],
    words: str,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    status, printed = train(*args, "data=digits")
    assert status == 2
    assert words in printed
    assert len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_no_further_processes_are_started_where_all_are_there(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not processes.wanted(composed("trainer=ddp_cpu"))


def test_several_machines_without_torchrun_or_srun_are_refused(train: Train) -> None:
    status, printed = train("data=digits", "trainer=ddp_cpu", "trainer.num_nodes=2")
    assert status == 2
    assert "torchrun" in printed


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SRUN | {"SLURM_NTASKS": "1"},
        SRUN | {"SLURM_JOB_NAME": "interactive"},
        SRUN | {"SLURM_JOB_NAME": "bash"},  # srun --pty bash
        TORCHRUN | {"WORLD_SIZE": "1"},
    ],
)
def test_one_task_is_a_run_like_any_other(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.launched() == (0, 1)
