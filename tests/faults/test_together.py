"""Runs that share a folder, at the same time or one after the other, or share a cache."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Train
from tests.data.cifar10_archives import Batches
from tests.faults.commands import STAGES, sha1_argument, start, wait_for
from tests.faults.held import held_by
from tests.faults.phases import TRAINING
from tests.faults.states import assert_same
from tests.test_sweep_resume import state

pytestmark = pytest.mark.slow

Undisturbed = Callable[[str], tuple[Path, dict[str, float], list[str]]]


def test_a_second_run_does_not_get_in_the_way_of_the_first(
    undisturbed: Undisturbed, train: Train, tmp_path: Path
) -> None:
    expected, _, args = undisturbed("fp32")
    out = tmp_path / "out"
    out.mkdir()
    order = tmp_path / "hold"
    here = [*args, f"hydra.run.dir={out}/run", held_by(order)]
    both = [start(here, out) for _ in range(2)]
    assert wait_for(TRAINING, out, both[0]) or wait_for(TRAINING, out, both[1])
    while all(process.popen.poll() is None for process in both):
        time.sleep(0.05)
    first, second = sorted(both, key=lambda process: process.popen.poll() is not None)
    assert second.wait() == 2, second.printed()
    for more in ([], ["resume=true"], ["seed=1"]):
        status, printed = train(*here, *more, f"output_dir={out}")
        assert status == 2
        assert f"another process is at work in {out}/run" in printed
    status, printed = train("-m", *args, f"hydra.sweep.dir={out}", f"output_dir={out}")
    assert status == 2
    assert "another process is at work" in printed
    order.unlink()
    assert first.wait() == 0, first.printed()
    assert_same(out, expected)

    before = state(out)
    status, printed = train(*here, f"output_dir={out}")
    assert status == 2
    assert "holds a run that is finished" in printed
    assert "resume=true" in printed
    assert state(out) == before


@pytest.mark.parametrize("more", [[], ["seed=1"]], ids=["the same", "another"])
def test_a_run_that_was_broken_off_is_not_begun_anew(
    more: list[str], train: Train, tmp_path: Path
) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"hours of training")
    here = f"hydra.run.dir={tmp_path}/run"
    status, printed = train("data=digits", here, *more)
    assert status == 2
    assert "holds a run that was broken off" in printed
    assert last.read_bytes() == b"hours of training"
    assert not (tmp_path / "run" / ".hydra").exists()


def test_two_sweeps_fetch_once_and_a_deleted_cache_is_made_again(
    undisturbed: Undisturbed,
    batches: Batches,
    slow_npm: dict[str, str],
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    (out / "root").mkdir(parents=True)
    args = [*STAGES["cifar10"][0], sha1_argument(batches), f"data.root={out}/root"]
    sweeps = [
        start(["-m", *args, f"hydra.sweep.dir={out}/{name}"], out, **slow_npm) for name in "ab"
    ]
    assert [sweep.wait() for sweep in sweeps] == [0, 0], [sweep.printed() for sweep in sweeps]
    calls = out / "npm_calls"
    assert len(calls.read_text().splitlines()) == 1
    accuracies = [
        json.loads((folder / "metrics.json").read_text())["accuracy"]
        for folder in (
            *(out / name / "0-fp32-x86" for name in "ab"),
            undisturbed("cifar10")[0] / "run",
        )
    ]
    assert accuracies[0] == accuracies[1] == accuracies[2]

    (out / "root" / "cifar10.npz").unlink()
    for name, value in slow_npm.items():
        monkeypatch.setenv(name, value)
    status, printed = train(*args, "stage=ptq", f"output_dir={out}")
    assert status == 0, printed
    assert len(calls.read_text().splitlines()) == 2
    assert sorted(os.listdir(out / "root")) == ["cifar10.npz", "cifar10.npz.lock"]
