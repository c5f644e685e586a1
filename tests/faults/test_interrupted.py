"""Ctrl-C keeps all saved files, and the printed command ends like an uninterrupted run."""

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_qat.in_use import is_in_use
from tests.faults.commands import COMMAND_FOLLOWS, run, send, start, wait_for
from tests.faults.held import held_by
from tests.faults.phases import SECOND_EPOCH, Phase
from tests.faults.states import assert_same, weights

pytestmark = pytest.mark.slow

Undisturbed = Callable[[str], tuple[Path, dict[str, float], list[str]]]


def command_in(printed: str) -> list[str]:
    """Return the arguments of the printed command."""
    assert "Traceback" not in printed
    python, script, *args = shlex.split(printed.split(COMMAND_FOLLOWS)[1])
    assert (python, Path(script).name) == ("python", "train.py")
    return [x for x in args if not x.startswith("output_dir=")]


def test_a_run_ends_with_130_and_the_command_that_continues_it(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    expected, _, args = undisturbed("fp32")
    out = tmp_path / "interrupted"
    out.mkdir()
    order = tmp_path / "hold"
    process = start([*args, f"hydra.run.dir={out}/run", held_by(order)], out)
    assert wait_for(SECOND_EPOCH, out, process)
    assert send(process, signal.SIGINT) == 130, process.printed()
    order.unlink()
    assert not is_in_use(out / "run")
    assert torch.load(out / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    continued = run(command_in(process.printed()), out)
    assert "Restored all states" in continued.printed()
    assert_same(out, expected)


def test_a_sweep_stops_and_goes_on_where_it_was(undisturbed: Undisturbed, tmp_path: Path) -> None:
    expected, _, args = undisturbed("fp32")
    out = tmp_path / "interrupted"
    out.mkdir()
    order = tmp_path / "hold"
    jobs = [
        "data.batch_size=16,0",
        f"hydra.sweep.dir={out}/a sweep",
        held_by(order),
    ]  # the second one fails at once
    process = start([*args, *jobs, "-m"], out)
    first = "a sweep/0-fp32-x86"
    assert wait_for(Phase("second epoch", f"{first}/checkpoints/last.ckpt"), out, process)
    assert send(process, signal.SIGINT) == 130, process.printed()
    order.unlink()
    assert [path.name for path in (out / "a sweep").glob("*-fp32-*")] == ["0-fp32-x86"]
    continued = start(command_in(process.printed()), out)
    assert continued.wait() == 2
    assert f"goes on from {out}/{first}/checkpoints/last.ckpt" in continued.printed()
    failure = json.loads((out / "a sweep" / "1-fp32-x86" / "failure.json").read_text())
    assert "batch_size=0" in failure["message"]
    found, wanted = (
        weights(folder / "checkpoints" / "last.ckpt") for folder in (out / first, expected / "run")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not is_in_use(out / "a sweep")
    assert not is_in_use(out / first)


def test_jobs_that_submitit_has_started_are_mentioned(tmp_path: Path) -> None:
    sweep = ["data=digits", "data.batch_size=0", f"hydra.sweep.dir={tmp_path}/out/sweep"]
    process = start(["-m", "launcher=submitit_local", *sweep], tmp_path / "out")
    assert wait_for(Phase("submitted", "sweep/.submitit/*/*_log.out"), tmp_path / "out", process)
    assert send(process, signal.SIGINT) == 130, process.printed()
    assert "Ctrl-C. Jobs that submitit started may continue to run" in process.printed()
    assert "hydra.sweep.dir=" in " ".join(command_in(process.printed()))
