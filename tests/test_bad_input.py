"""A user's mistake ends with status 2 and one message: what, why, what to do; nothing is lost."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Road, Train

pytestmark = pytest.mark.slow

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "batch_size": (["data.batch_size=0"], ["batch_size=0", ">= 1"]),
    "batch_size_word": (["data.batch_size=many"], ["batch_size='many'", ">= 1"]),
    "val_size": (["data.val_size=1437"], ["val_size=1437", "1437 training images"]),
    "seed": (["seed=lucky"], ["seed='lucky'", "integer"]),
    "max_epochs": (["trainer.max_epochs=0"], ["trainer.max_epochs=0", ">= 1"]),
    "learning_rate": (["model.learning_rate=fast"], ["learning_rate='fast'", "number"]),
    "no_gpu": (["trainer=gpu"], ["gpu", "trainer=auto"]),
    "diverged": (["model.learning_rate=1e12"], ["loss became", "Lower model.learning_rate"]),
    "unknown_argument": (["+data.colour=red"], ["colour", "DigitsDataModule"]),
    "fp32_missing": (
        ["stage=qat", "fp32_ckpt=nowhere.ckpt"],
        ["nowhere.ckpt", "python train.py stage=fp32 data=digits model=resnet18 seed=0"],
    ),
    "resume_missing": (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "last.ckpt"]),
    "folder_missing": (["data=folder", "data.root=nowhere"], ["nowhere"]),
    "folder_unset": (["data=folder"], ["data.root"]),
    "cifar10_root_is_a_file": (["data=cifar10", f"data.root={__file__}"], [__file__]),
}


def everything_in(folder: Path) -> dict[Path, bytes]:
    """Content by path, but for the logs of the failed run."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "runs" not in path.relative_to(folder).parts
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU for one case")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_and_nothing_is_overwritten(name: str, train: Train, road: Road) -> None:
    args, words = MISTAKES[name]
    before = everything_in(road.output_dir)
    status, printed = train(
        "data=digits", "trainer.max_epochs=1", f"output_dir={road.output_dir}", *args
    )
    assert status == 2, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed
    assert everything_in(road.output_dir) == before


@pytest.mark.parametrize("option", ["fp32_ckpt", "ckpt_path"])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_damaged_checkpoint(
    option: str, content: str, train: Train, road: Road, tmp_path: Path
) -> None:
    whole = road.fp32_ckpt.read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"weights", "empty": b""}[content]
    )
    status, printed = train("data=digits", "stage=qat", f"{option}={damaged}", *_from(road, option))
    assert status == 2, printed
    assert "damaged.ckpt" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("other", ["model=resnet18_imagenet_stem", "classes"])
def test_checkpoint_of_another_network(
    other: str, train: Train, road: Road, tmp_path: Path
) -> None:
    args, file = [other], road.fp32_ckpt
    if other == "classes":
        checkpoint = torch.load(road.fp32_ckpt, weights_only=True)
        checkpoint["state_dict"]["net.fc.weight"] = torch.zeros(7, 512)
        checkpoint["state_dict"]["net.fc.bias"] = torch.zeros(7)
        args, file = [], tmp_path / "seven.ckpt"
        torch.save(checkpoint, file)
    status, printed = train("data=digits", "stage=qat", f"fp32_ckpt={file}", *args)
    assert status == 2, printed
    assert "another" in printed
    assert "size mismatch" in printed


def test_resuming_from_a_run_of_another_stage(train: Train, road: Road) -> None:
    other = road.job("fp32") / "checkpoints" / "last.ckpt"
    status, printed = train(
        "data=digits", "stage=qat", f"ckpt_path={other}", f"fp32_ckpt={road.fp32_ckpt}"
    )
    assert status == 2, printed
    assert "another" in printed


def test_a_checkpoint_that_would_run_code_is_refused(train: Train, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (trap,)  # type: ignore[return-value]

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.ckpt")
    status, printed = train("data=digits", "stage=qat", f"fp32_ckpt={tmp_path}/hostile.ckpt")
    assert status == 2, printed
    assert not trap.exists()


def _from(road: Road, option: str) -> list[str]:
    return [] if option == "fp32_ckpt" else [f"fp32_ckpt={road.fp32_ckpt}"]


def test_corrupted_archive(train: Train, tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"not an archive")
    status, printed = train("stage=fp32", f"data.root={tmp_path}")
    assert status == 2, printed
    assert str(archive) in printed.replace("\n", "")
    assert "Traceback" not in printed
    assert archive.read_bytes() == b"not an archive"
