"""A user's mistake ends with status 2 and one message: what, why, what to do; nothing is lost."""

from pathlib import Path

import pytest
import torch

from lightning_qat.network import resnet18
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
    "seed_too_large": (["seed=99999999999"], ["seed=99999999999", "4294967295"]),
    "one_image_a_step": (["data.batch_size=1"], ["raise data.batch_size"]),
    "flip_word": (["data.flip=maybe"], ["flip='maybe'", "alternating"]),
    "label_smoothing": (["model.label_smoothing=2"], ["label_smoothing=2", "0 to 1"]),
    "decay_all": (["model.decay_all=some"], ["decay_all='some'", "true or false"]),
    "compile": (["model.compile=fast"], ["compile='fast'", "reduce-overhead"]),
    "nesterov": (["model.momentum=0"], ["model.momentum above 0"]),
    "milestones": (["model.milestones=5"], ["model.milestones=5", "list"]),
    "stem": (["model.net.stem=imagenett"], ["imagenett", "cifar or imagenet"]),
    "accelerator": (["trainer.accelerator=abacus"], ["abacus", "trainer"]),
    "precision": (["trainer.precision=5"], ["precision", "trainer"]),
    "limit": (["trainer.limit_train_batches=few"], ["trainer"]),
    "weights_number": (["model.weights=5"], ["5", "path"]),
    "ckpt_number": (["ckpt_path=5"], ["5", "path"]),
    "root_number": (["data=cifar10", "data.root=5"], ["data.root=5", "path"]),
    "fp32_ckpt_is_a_folder": (["fp32_ckpt=/tmp"], ["fp32_ckpt=/tmp"]),
    "fp32_ckpt_null": (["stage=qat", "fp32_ckpt=null"], ["starts from trained weights"]),
    "freeze_word": (
        ["stage=qat", "callbacks.result.freeze_observer_epoch=soon"],
        ["freeze_observer_epoch='soon'"],
    ),
    "saturation_word": (["stage=qat", "allow_saturation=no_way"], ["allow_saturation='no_way'"]),
    "too_many_bits": (
        ["stage=ptq", "qconfig=custom", "qconfig.weight_bits=9"],
        ["qconfig.weight_bits=9", "2 to 8"],
    ),
    "no_such_scales": (
        ["stage=qat", "qconfig=custom", "qconfig.scales=lerned"],
        ["scales='lerned'", "learned_offset"],
    ),
    "distill_word": (["stage=qat", "distill=a_bit"], ["distill='a_bit'", "true or false"]),
    "scale_learning_rate": (
        ["model.scale_learning_rate=fast"],
        ["scale_learning_rate='fast'", "number"],
    ),
    "only_one_layer": (["stage=ptq", "only=layer9"], ["no layer 'layer9'", "layer4"]),
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


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_and_nothing_is_overwritten(name: str, train: Train, road: Road) -> None:
    if name == "no_gpu" and torch.cuda.is_available():
        pytest.skip("this machine has one")
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


def test_resuming_from_weights_only(train: Train, road: Road) -> None:
    status, printed = train("data=digits", f"ckpt_path={road.fp32_ckpt}")
    assert status == 2, printed
    assert "not the state of a run" in printed


def test_resuming_with_another_length(train: Train, road: Road) -> None:
    last = road.job("fp32") / "checkpoints" / "last.ckpt"
    status, printed = train("data=digits", f"ckpt_path={last}", "trainer.max_epochs=20")
    assert status == 2, printed
    assert "the same trainer.max_epochs" in printed


def test_weights_of_other_data(train: Train, road: Road) -> None:
    status, printed = train(
        "data=digits", "stage=qat", f"fp32_ckpt={road.fp32_ckpt}", "+data.mean=[0.1,0.2,0.3]"
    )
    assert status == 2, printed
    assert "was trained with mean" in printed


def test_published_weights_for_other_classes_are_no_start_for_qat(
    train: Train, tmp_path: Path
) -> None:
    torch.save(resnet18(num_classes=7).state_dict(), tmp_path / "seven.pth")
    status, printed = train("data=digits", "stage=qat", f"fp32_ckpt={tmp_path}/seven.pth")
    assert status == 2, printed
    assert "class count" in printed


@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["single", "multirun"])
def test_output_dir_that_cannot_be_made(multirun: list[str], train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, printed = train(*multirun, "data=digits", f"output_dir={tmp_path}/file/outputs")
    assert status == 2, printed
    assert "output_dir" in printed
    assert "Traceback" not in printed


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
