"""A full or read-only disk gives one message and status 2, and leaves no incomplete file."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Train
from tests.data.cifar10_archives import Batches
from tests.faults.commands import DIGITS, sha1_argument
from tests.faults.states import assert_whole

pytestmark = pytest.mark.slow

Mount = Callable[[str], Path]
FP32 = (*DIGITS, "trainer.max_epochs=1", "export_onnx=false")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a file system of a given size, or changes it."""
    at = tmp_path / "disk"
    at.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if at.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}{options}", "tmpfs", str(at)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and not remount:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        assert not done.returncode, done.stderr
        return at

    yield mount
    if at.is_mount():
        subprocess.run(["umount", "-l", str(at)], check=True)


def assert_full(ended: tuple[int, str], out: Path) -> None:
    status, printed = ended
    assert status == 2, printed
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    assert "Free some space" in printed
    hidden = [path.name for path in out.rglob(".*")]
    assert not [name for name in hidden if name != ".hydra" and not name.endswith(".lock")]
    (out / "run" / "failure.json").unlink(missing_ok=True)
    assert_whole(out)


def test_no_room_to_begin(disk: Mount, train: Train) -> None:
    at = disk("size=32k")
    assert_full(train(*FP32, f"output_dir={at}", f"hydra.run.dir={at}/run"), at)
    assert_full(train("-m", *FP32, f"output_dir={at}", f"hydra.sweep.dir={at}/sweep"), at)


def test_no_room_for_a_checkpoint_and_after_it_was_made(
    disk: Mount, train: Train, tmp_path: Path
) -> None:
    at = disk("size=120m")  # best.ckpt has 90 MB, and so has last.ckpt
    here = (*FP32, f"output_dir={at}", f"hydra.run.dir={at}/run", f"fp32_ckpt={tmp_path}/x.ckpt")
    ended = train(*here)
    assert_full(ended, at)
    assert f"{at}/run/checkpoints/last.ckpt cannot be written" in ended[1]
    assert not (tmp_path / "x.ckpt").exists()
    disk("size=300m")
    status, printed = train(*here, "resume=true")
    assert status == 0, printed
    assert (tmp_path / "x.ckpt").exists()


def test_no_room_for_the_weights_that_later_stages_start_from(
    disk: Mount, train: Train, tmp_path: Path
) -> None:
    at = disk("size=10m")
    torch.save({"state_dict": {}, "global_step": 1}, at / "weights")  # of another run
    before = (at / "weights").read_bytes()
    ended = train(*FP32, f"hydra.run.dir={tmp_path}/run", f"fp32_ckpt={at}/weights")
    assert_full(ended, at)
    assert f"{at}/weights cannot be written" in ended[1]
    assert (at / "weights").read_bytes() == before


@pytest.mark.parametrize(
    ("size", "more", "file"),
    [
        ("5m", ["export_onnx=false"], "model_int8.ts"),
        ("30m", ["export_onnx=false"], "model_fp32.ts"),
        ("12000k", [], "model_int8.onnx"),
        ("13500k", [], "model_int8.xml"),
    ],
    ids=["torchscript", "what is measured", "onnx", "openvino"],
)
def test_no_room_for_the_exports(
    size: str, more: list[str], file: str, disk: Mount, train: Train, fp32_ckpt: Path
) -> None:
    at = disk(f"size={size}")
    args = (*DIGITS, "stage=ptq", f"fp32_ckpt={fp32_ckpt}", f"output_dir={at}")
    ended = train(*args, *more, f"hydra.run.dir={at}/run")
    assert_full(ended, at)
    assert f"{file} cannot be written" in ended[1]
    assert not (at / "run" / "metrics.json").exists()


def test_every_job_of_a_sweep_says_it(disk: Mount, train: Train) -> None:
    at = disk("size=50m")
    status, printed = train(
        "-m", *FP32, "seed=0,1", f"output_dir={at}", f"hydra.sweep.dir={at}/sweep"
    )
    assert status == 2, printed
    assert "Traceback" not in printed
    assert (at / "sweep" / "sweep.csv").read_text().count("No space left on device") == 2


def test_no_room_for_cifar10(
    disk: Mount, train: Train, archive: Path, batches: Batches, tmp_path: Path
) -> None:
    at = disk("size=20m")
    shutil.copy(archive, at)
    args = ("data=cifar10", f"data.root={at}", sha1_argument(batches))
    status, printed = train(*args, *FP32[1:], f"hydra.run.dir={tmp_path}/run")
    assert status == 2, printed
    assert "No space left on device" in printed
    assert "data.root=" in printed
    assert "Traceback" not in printed
    assert {path.name for path in at.iterdir()} == {archive.name, "cifar10.npz.lock"}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("output_dir", "the output folder {}/runs"),
        ("hydra.run.dir", "the output folder {}/run cannot be used"),
        ("fp32_ckpt", "name another with fp32_ckpt=FILE"),
        ("data.root", "name another one with data.root="),
    ],
    ids=["output_dir", "hydra.run.dir", "fp32_ckpt", "data.root"],
)
def test_read_only(
    what: str, words: str, disk: Mount, train: Train, batches: Batches, tmp_path: Path
) -> None:
    at = disk("size=1m")
    (at / "run").mkdir()
    disk("ro")
    args = [*FP32, f"hydra.run.dir={tmp_path}/run"]
    if what == "output_dir":
        args = [*FP32, f"output_dir={at}"]
    elif what == "hydra.run.dir":
        args = [*FP32, f"hydra.run.dir={at}/run"]
    elif what == "fp32_ckpt":
        args.append(f"fp32_ckpt={at}/x.ckpt")
    else:
        args[0] = "data=cifar10"
        args += [f"data.root={at}", sha1_argument(batches)]
    status, printed = train(*args)
    assert status == 2, printed
    assert words.format(at) in printed
    assert str(at) in printed
    assert "Traceback" not in printed
