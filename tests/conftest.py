"""Fixtures that run train.py like a user. torch's own deprecations are silenced."""

import fcntl
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import absl.logging
import pytest
from filelock import FileLock

from lightning_qat._torch_deprecations import FILTERS

TRAIN = Path(__file__).parents[1] / "train.py"
# For a process whose memory is measured: glibc keeps freed memory, sometimes 29 MB.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # None = there is only one test process

if WORKER:  # each worker has one core, and its subprocesses inherit this
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    # OpenVINO imports absl, and its handler closes the stream of pytest when Hydra sets up its
    # logging.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
    for message, category in FILTERS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files so that both processes are busy from the first test to the last.

    One process makes ``road`` while the other runs slow files without it. Fast files come last.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    with_road = {item.path for item in items if "road" in getattr(item, "fixturenames", ())}
    first = min(with_road, default=None)

    def place(item: pytest.Item) -> int:
        if item.path == first:
            return 0
        if item.path in with_road:
            return 2
        return 1 if item.path in slow else 3

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test with the mark `alone` while the other processes wait, because it measures time."""
    if not WORKER:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    folder = item.config.cache.mkdir("alone")  # type: ignore[union-attr]
    with (folder / "gate").open("w") as gate, (folder / "machine").open("w") as machine:
        # closed while a process waits to be alone, or it would wait for ever
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return every kind of exported file of one small network, see `artifacts.export`."""
    from tests.deployment.artifacts import export  # imports torch

    return export(tmp_path_factory.mktemp("exported"))


@dataclass
class Road:
    """The output folder of `train.py -m stage=fp32,ptq,qat data=digits`."""

    output_dir: Path
    sweep: Path  # other tests may write sweeps next to it
    printed: str
    warned: str

    def job(self, stage: str) -> Path:
        """Return the run directory of one stage."""
        (folder,) = self.sweep.glob(f"*-{stage}-*")
        return folder

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics.json of one stage."""
        return json.loads((self.job(stage) / "metrics.json").read_text())

    @property
    def fp32_ckpt(self) -> Path:
        """Return the checkpoint that ptq and qat started from."""
        return self.output_dir / "fp32" / "digits-resnet18-seed0.ckpt"


def for_all_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that is the same in each test process."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """Run the README's main command in its own process, once for all test processes."""
    folder = for_all_processes(tmp_path_factory)
    output_dir, said = folder / "road", folder / "road.json"
    with FileLock(folder / "road.lock"):
        if not said.exists():
            done = run_train("-m", "stage=fp32,ptq,qat", "data=digits", f"output_dir={output_dir}")
            assert done.returncode == 0, done.stdout + done.stderr
            (sweep,) = map(str, output_dir.glob("multiruns/*"))
            said.write_text(json.dumps([sweep, done.stdout, done.stderr]))
    sweep, printed, warned = json.loads(said.read_text())
    return Road(output_dir, Path(sweep), printed, warned)


def run_train(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python train.py ...` to its end."""
    return subprocess.run(
        [sys.executable, str(TRAIN), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=TRAIN.parent,
    )


Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Train:
    """Run train.py in this process, because a new one takes seconds; return status and output."""

    def run(*args: str) -> tuple[int, str]:
        given = any(arg.startswith("output_dir=") for arg in args)
        output_dir = [] if given else [f"output_dir={tmp_path}/out"]
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *args, *output_dir])
        capfd.readouterr()
        status: Any = 0
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        printed, errors = capfd.readouterr()
        return status, printed + errors

    return run
