"""Runs that are interrupted: real processes of train.py, with one thread each."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.conftest import TRAIN
from tests.data.cifar10_archives import TRAIN_BATCHES, Batches
from tests.faults.phases import CIFAR10, FETCHED, FP32, PTQ, QAT, Phase

QUICK = (
    *("trainer=cpu", "model=resnet18_imagenet_stem", "trainer.limit_train_batches=4"),
    *("data.batch_size=16", "data.val_size=32", "latency_seconds=0"),
)
DIGITS = ("data=digits", *QUICK)
STAGES: dict[str, tuple[tuple[str, ...], tuple[Phase, ...]]] = {
    "fp32": ((*DIGITS, "stage=fp32", "trainer.max_epochs=2", "export_onnx=false"), FP32),
    "ptq": ((*DIGITS, "stage=ptq", "export_onnx=false"), PTQ),
    "qat": ((*DIGITS, "stage=qat", "trainer.max_epochs=2"), QAT),
    "cifar10": (("data=cifar10", *QUICK, "trainer.max_epochs=1", "export_onnx=false"), CIFAR10),
    "cifar10 fetched": (
        ("data=cifar10", *QUICK, "trainer.max_epochs=1", "export_onnx=false"),
        FETCHED,
    ),
}
COMMAND_FOLLOWS = "This continues it:"
LONGEST = 600  # seconds, on a machine with other work


def cifar10_batches(train: int = 1000, test: int = 50) -> Batches:
    """Return enough random images that reading, decoding and writing them takes some time."""
    rng = np.random.default_rng(0)
    made = {}
    for name in [*TRAIN_BATCHES, "test_batch"]:
        count = test if name == "test_batch" else train
        made[name] = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        made[name][:, 0] = rng.permutation(count) % 10
    return made


def sha1_argument(batches: Batches) -> str:
    digests = (f"{n}:'{hashlib.sha1(x.tobytes()).hexdigest()}'" for n, x in batches.items())
    return f"+data.sha1={{{','.join(digests)}}}"


@dataclass
class Process:
    """A running train.py, and the file of its output."""

    popen: subprocess.Popen[bytes]
    output: Path

    def wait(self) -> int:
        return self.popen.wait(LONGEST)

    def printed(self) -> str:
        return self.output.read_text(errors="replace")


def start(args: Sequence[str], out: Path, **environment: str) -> Process:
    """Start `python train.py ARGS output_dir=OUT`; its temporary files go to OUT/tmp."""
    for folder in (out, out / "tmp"):
        folder.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(out / "tmp")} | environment
    number = len(list(out.parent.glob(f"{out.name}-*.log")))
    output = out.with_name(f"{out.name}-{number}.log")
    with output.open("wb") as file:
        at = next(i for i, x in enumerate(args) if "=" in x)  # options stay in their place
        words = [*args[:at], f"output_dir={out}", *args[at:]]
        command = [sys.executable, str(TRAIN), *words]
        popen = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=TRAIN.parent)
    return Process(popen, output)


def run(args: Sequence[str], out: Path, **environment: str) -> Process:
    """Start train.py, and wait for its end with status 0."""
    process = start(args, out, **environment)
    assert process.wait() == 0, process.printed()
    return process


def wait_for(phase: Phase, out: Path, process: Process) -> bool:
    """Wait until the phase has begun; False if the process has ended before."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        if phase.has_begun(out):
            return True
        if process.popen.poll() is not None:
            return False
        time.sleep(0.005)
    raise TimeoutError(f"{phase} did not begin: {process.printed()}")


def timed(args: Sequence[str], out: Path, phases: Sequence[Phase]) -> dict[str, float]:
    """Run to the end; return the seconds of each phase."""
    began = {}
    process = start(args, out)
    for phase in phases:
        assert wait_for(phase, out, process), (phase, process.printed())
        began[phase.name] = time.monotonic()
    assert process.wait() == 0, process.printed()
    ends = [*list(began.values())[1:], time.monotonic()]
    return {name: end - at for (name, at), end in zip(began.items(), ends, strict=True)}


def send(process: Process, number: signal.Signals) -> int:
    """Send the signal; return the exit status of the process."""
    process.popen.send_signal(number)
    return process.wait()
