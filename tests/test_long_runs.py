"""Memory and files do not grow over hundreds of epochs, or many jobs, in one process."""

import json
from pathlib import Path

import pytest

from tests.conftest import GIVES_BACK, run_train

pytestmark = pytest.mark.slow

EPOCHS, JOBS = 200, 10


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [
        "data=digits",
        "trainer.limit_train_batches=2",
        "latency_seconds=0",
        "export_onnx=false",
        "model.net._target_=tests.long_run.TinyNet",
        "~model.net.stem",
        f"output_dir={tmp_path}/out",
        f"fp32_ckpt={tmp_path}/fp32.ckpt",
        "+callbacks.watch._target_=tests.long_run.Watch",
        f"+callbacks.watch.file={tmp_path}/seen",
    ]


def train(*args: str) -> tuple[int, str]:
    """Train in a new process, because other tests change the memory of this one."""
    done = run_train(*args, **GIVES_BACK)
    return done.returncode, done.stdout + done.stderr


def seen(folder: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in (folder / "seen").read_text().splitlines()]


def test_200_epochs_hold_no_more_than_50_and_log_what_an_epoch_needs(
    settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings.append("+callbacks.watch.every=50")
    assert train("stage=fp32", "trainer.max_epochs=1", *settings)[0] == 0
    (tmp_path / "seen").unlink()
    epochs = EPOCHS + 1  # so that epoch 200 starts
    status, printed = train(
        "stage=qat", f"trainer.max_epochs={epochs}", f"hydra.run.dir={run}", *settings
    )
    assert status == 0, printed
    _, first, *_, last = seen(tmp_path)
    assert (last["files"], last["threads"]) == (first["files"], first["threads"])
    assert last["objects"] - first["objects"] < 100  # of 150 epochs
    assert last["bytes"] - first["bytes"] < 4e6  # one checkpoint an epoch would be 6 MB

    sizes = {str(x.relative_to(run)): x.stat().st_size for x in run.rglob("*") if x.is_file()}
    (events,) = [size for name, size in sizes.items() if name.startswith("tensorboard/events")]
    assert sizes["train.log"] < 2_000  # no lines per epoch
    assert sizes["csv/metrics.csv"] < 200 * epochs  # two rows per epoch
    assert events < 500 * epochs  # six numbers
    assert len(printed) < 1_000 * epochs  # one line per epoch if stdout is no terminal
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "last.ckpt"}


def test_ten_jobs_in_one_process_hold_no_more_than_two(settings: list[str], tmp_path: Path) -> None:
    settings += ["trainer.max_epochs=1", "+callbacks.watch.every=1", "+model.net.width=8192"]
    assert train("stage=fp32", *settings)[0] == 0
    weights = (tmp_path / "fp32.ckpt").stat().st_size
    (tmp_path / "seen").unlink()
    seeds = ",".join(map(str, range(JOBS)))
    status, printed = train("-m", "stage=qat", f"seed={seeds}", *settings)
    assert status == 0, printed
    _, _, before, *_, after = looks = seen(tmp_path)
    assert len(looks) == JOBS
    jobs = JOBS - 3
    assert after["files"] == before["files"]
    assert after["threads"] <= before["threads"] + 1  # torch's own pools start when they are used
    assert after["objects"] - before["objects"] < 2_000 * jobs  # Hydra keeps their configurations
    assert after["bytes"] - before["bytes"] < jobs * weights / 2
