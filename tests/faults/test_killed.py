"""A run that is killed at any moment leaves only complete files, and continues correctly.

The moments are random within each phase of a run, and the same for the same seed. To test all
thirty:

    LIGHTNING_QAT_FAULT_MOMENTS=30 python -m pytest -s tests/faults/test_killed.py
"""

import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.commands import COMMAND_FOLLOWS, STAGES, run, send, start, wait_for
from tests.faults.phases import reached
from tests.faults.states import assert_same, assert_whole

pytestmark = pytest.mark.slow

# The first entries run in every CI run. The third is continued by ckpt_path, see `moments`.
STRATA = [
    ("cifar10 fetched", "fetching"),
    ("ptq", "converting"),
    ("fp32", "second epoch"),
    ("qat", "exporting"),
    ("cifar10", "unpacking and decoding"),
    ("qat", "checkpointing"),
    ("fp32", "keeping the weights"),
    ("cifar10", "caching"),
    ("ptq", "exporting"),
    ("qat", "reporting"),
    ("fp32", "training"),
    ("qat", "converting"),
    ("fp32", "checkpointing"),
    ("ptq", "reporting"),
    ("qat", "second epoch"),
    ("fp32", "reporting"),
    ("cifar10 fetched", "unpacking and decoding"),
    ("qat", "measuring"),
    ("fp32", "measuring"),
    ("ptq", "calibrating"),
    ("qat", "training"),
    ("fp32", "loading"),
    ("qat", "starting"),
]


@dataclass(frozen=True)
class Moment:
    stage: str
    phase: str
    signal: signal.Signals
    fraction: float  # of the phase
    by_ckpt_path: bool  # continued in another folder, if there is a checkpoint

    def __str__(self) -> str:
        return f"{self.stage}-{self.phase}-{self.signal.name}-{self.fraction:.2f}".replace(" ", "_")


def moments() -> list[Moment]:
    count = int(os.environ.get("LIGHTNING_QAT_FAULT_MOMENTS", "5"))
    rng = random.Random(int(os.environ.get("LIGHTNING_QAT_FAULT_SEED", "0")))
    signals = (signal.SIGKILL, signal.SIGTERM)
    return [
        Moment(*STRATA[i % len(STRATA)], signals[i % 2], rng.random(), i % 4 == 2)
        for i in range(count)
    ]


Undisturbed = Callable[[str], tuple[Path, dict[str, float], list[str]]]
MOMENTS = moments()


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    undisturbed: Undisturbed,
    archive: Path,
    slow_npm: dict[str, str],
    faults: Path,
) -> dict[Moment, Future[str]]:
    """Run two at a time if there are as few as in a CI run."""

    def outcome(number: int, moment: Moment) -> str:
        out = faults / f"killed {number}"
        out.mkdir()
        expected = undisturbed(moment.stage.split()[0])
        environment = slow_npm if moment.stage == "cifar10 fetched" else {}
        return killed_and_continued(moment, *expected, archive, environment, out)

    asked_for = {item.name for item in request.session.items}
    with ThreadPoolExecutor(2 if len(MOMENTS) <= 5 else 1) as workers:  # waits for all of them
        return {
            x: workers.submit(outcome, number, x)
            for number, x in enumerate(MOMENTS)
            if any(name.endswith(f"[{x}]") for name in asked_for)
        }


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_killed_and_continued_ends_as_if_nothing_had_happened(
    moment: Moment, outcomes: dict[Moment, Future[str]]
) -> None:
    print(f"\n{outcomes[moment].result()}", file=sys.stderr)


def killed_and_continued(
    moment: Moment,
    expected: Path,
    seconds: dict[str, float],
    args: list[str],
    archive: Path,
    environment: dict[str, str],
    folder: Path,
) -> str:
    phases = STAGES[moment.stage][1]
    (phase,) = (phase for phase in phases if phase.name == moment.phase)
    delay = moment.fraction * (2.0 if phase.name == "fetching" else seconds[phase.name])
    for attempt in range(4):
        out = folder / str(attempt)
        here = [*args, f"hydra.run.dir={out}/run"]
        out.mkdir()
        if moment.stage.startswith("cifar10"):
            (out / "root").mkdir()
            here += [f"data.root={out}/root"]
        if moment.stage == "cifar10":
            (out / "root" / archive.name).hardlink_to(archive)
        process = start(here, out, **environment)
        if wait_for(phase, out, process):
            time.sleep(delay)
            hit = reached(phases, out)
            if status := send(process, moment.signal):
                break
        delay /= 2  # it was done already
    else:
        pytest.fail(f"done before it could be killed: {process.printed()}")
    if moment.signal == signal.SIGKILL:
        assert status == -signal.SIGKILL
    elif phase.name != "starting" and hit.name != "done":  # at its start, Python takes the signal
        assert status == 128 + signal.SIGTERM, process.printed()
    assert_whole(out)

    run_folder = "run"
    last = out / "run" / "checkpoints" / "last.ckpt"
    if COMMAND_FOLLOWS in process.printed():
        how = "its own command"
        again = shlex.split(process.printed().split(COMMAND_FOLLOWS)[1])[2:]
    elif moment.by_ckpt_path and last.exists():
        how, run_folder = "ckpt_path", "run2"
        again = [x for x in here if not x.startswith("hydra.run.dir=")]
        again += [f"hydra.run.dir={out}/{run_folder}", f"ckpt_path={last}"]
    elif moment.stage == "ptq" and not (out / "run" / "report.html").exists():
        how, again = "run again", here
    else:
        how, again = "resume=true", [*here, "resume=true"]
    continued = run([x for x in again if not x.startswith("output_dir=")], out, **environment)
    if how == "ckpt_path":
        assert "Restored all states" in continued.printed()
    if environment:  # delete files of npm and of the uninterrupted run
        (out / "npm_calls").unlink()
        (out / "fetched").unlink()
        (out / "root" / archive.name).touch()
    assert_same(out, expected, run_folder)
    name = moment.signal.name
    cells = [
        moment.stage,
        hit.name,
        name,
        f"{phase.name} + {delay:.2f} s",
        f"{status}, {how}: same",
    ]
    return f"| {' | '.join(cells)} |"
