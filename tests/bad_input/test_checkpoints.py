"""A damaged, hostile or wrong checkpoint is named in the message, and none of its code runs."""

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat.network import resnet18
from tests.bad_input.conftest import QUICK, Refused
from tests.conftest import Road

pytestmark = pytest.mark.slow

Make = Callable[[Path, Path], Any]


class Hostile:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trap),)


def changed(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Return a function that writes the whole checkpoint with one change."""

    def make(file: Path, whole: Path) -> None:
        checkpoint = torch.load(whole, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, file)

    return make


def other_classes(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["net.fc.weight"] = torch.zeros(7, 512)
    checkpoint["state_dict"]["net.fc.bias"] = torch.zeros(7)


def text_in_a_zip(file: Path, whole: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def torchscript(file: Path, whole: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(file)


def bare_pickle(file: Path, whole: Path) -> None:
    file.write_bytes(pickle.dumps(Hostile(file.with_name("sprung"))))


def zipped_pickle(file: Path, whole: Path) -> None:
    torch.save({"state_dict": Hostile(file.with_name("sprung"))}, file)


# kind of damage: how to make it from a whole checkpoint, words of the message
DAMAGED: dict[str, tuple[Make, str]] = {
    "truncated": (
        lambda file, whole: file.write_bytes(whole.read_bytes()[:-999]),
        "cannot be read",
    ),
    "one half": (lambda file, whole: file.write_bytes(whole.read_bytes()[:9999]), "cannot be read"),
    "text": (lambda file, whole: file.write_text("weights"), "cannot be read"),
    "empty": (lambda file, whole: file.touch(), "cannot be read"),
    "text in a zip": (text_in_a_zip, "cannot be read"),
    "TorchScript": (torchscript, "cannot be read"),
    "pickle with code": (bare_pickle, "cannot be read"),
    "checkpoint with code": (zipped_pickle, "cannot be read"),
    "tensor": (lambda file, whole: torch.save(torch.zeros(3), file), "holds a Tensor"),
    "directory": (lambda file, whole: file.mkdir(), "there is no checkpoint"),
    "dangling link": (lambda file, whole: file.symlink_to("nowhere"), "there is no checkpoint"),
    "pipe": (lambda file, whole: os.mkfifo(file), "there is no checkpoint"),
    "NaN": (
        changed(lambda x: x["state_dict"]["net.conv1.weight"].fill_(float("nan"))),
        "in net.conv1.weight|in conv1.weight",
    ),
}


@pytest.mark.parametrize("option", ["fp32_ckpt", "ckpt_path", "model.weights"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoint(
    option: str, name: str, refused: Refused, road: Road, tmp_path: Path
) -> None:
    make, words = DAMAGED[name]
    whole = road.job("fp32") / "checkpoints" / "last.ckpt"
    make(tmp_path / "damaged.ckpt", whole if option == "ckpt_path" else road.fp32_ckpt)
    stage = "stage=qat" if option == "fp32_ckpt" else "stage=fp32"
    printed = refused(*QUICK, stage, f"{option}={tmp_path}/damaged.ckpt", words=["damaged.ckpt"])
    assert any(word in printed.replace("\n", " ") for word in words.split("|")), printed
    assert not (tmp_path / "sprung").exists()


def test_the_hostile_checkpoints_are_hostile(tmp_path: Path) -> None:
    bare_pickle(tmp_path / "bare", tmp_path)
    pickle.loads((tmp_path / "bare").read_bytes())
    (tmp_path / "sprung").rmdir()
    zipped_pickle(tmp_path / "zipped", tmp_path)
    torch.load(io.BytesIO((tmp_path / "zipped").read_bytes()), weights_only=False)
    assert (tmp_path / "sprung").exists()


# readable checkpoints: what is wrong, how to make it, arguments, words of the message
OTHER: dict[str, tuple[Make, list[str], list[str]]] = {
    "classes": (changed(other_classes), [], ["another", "size mismatch"]),
    "stem": (changed(lambda x: None), ["model=resnet18_imagenet_stem"], ["another", "mismatch"]),
    "data": (changed(lambda x: None), ["+data.mean=[0.1,0.2,0.3]"], ["was trained with mean"]),
    "names of classes": (
        changed(lambda x: x["hyper_parameters"].update(class_names=[*"123456789", "0"])),
        [],
        ["was trained with class_names=['1', '2'"],
    ),
    "mean that is none": (
        changed(lambda x: x["hyper_parameters"].update(mean=5)),
        [],
        ["was trained with mean=5"],
    ),
    "hyper-parameters that are none": (
        changed(lambda x: x.update(hyper_parameters=[1])),
        [],
        ["hyper_parameters are damaged"],
    ),
    "weights without names": (
        lambda file, whole: torch.save({1: torch.zeros(2)}, file),
        [],
        ["holds no weights by name"],
    ),
    "weights that are a list": (
        changed(lambda x: x.update(state_dict=[1])),
        [],
        ["holds no weights by name"],
    ),
    "words for weights": (
        changed(lambda x: x["state_dict"].update({"net.fc.bias": "none"})),
        [],
        ["another network"],
    ),
    "one layer less": (changed(lambda x: x["state_dict"].pop("net.fc.bias")), [], ["Missing key"]),
    "published weights of other classes": (
        lambda file, whole: torch.save(resnet18(num_classes=7).state_dict(), file),
        [],
        ["class count"],
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_checkpoint_of_another_network(
    name: str, refused: Refused, road: Road, tmp_path: Path
) -> None:
    make, args, words = OTHER[name]
    make(tmp_path / "other.ckpt", road.fp32_ckpt)
    printed = refused(
        *(*QUICK, "stage=qat", f"fp32_ckpt={tmp_path}/other.ckpt", *args),
        words=["other.ckpt", *words],
    )
    assert f"fp32_ckpt={tmp_path}/other.ckpt" not in printed  # this advice would replace the file


@pytest.mark.parametrize("name", ["text", "published weights", "a run's own"])
def test_training_does_not_replace_what_is_no_result_of_it(
    name: str, refused: Refused, road: Road, tmp_path: Path
) -> None:
    file = tmp_path / "mine.ckpt"
    if name == "text":
        file.write_text("notes")
    elif name == "published weights":
        torch.save(resnet18(num_classes=10).state_dict(), file)
    else:
        shutil.copyfile(road.job("qat") / "checkpoints" / "last.ckpt", file)
    refused(*QUICK, "stage=fp32", f"fp32_ckpt={file}", words=["name another file with fp32_ckpt="])


# runs that cannot be continued: stage, change of the checkpoint, arguments, words of the message
RUNS: dict[str, tuple[str, Make, list[str], list[str]]] = {
    "another stage": ("fp32", changed(lambda x: None), ["stage=qat"], ["holds no scales of 'net'"]),
    "another length": (
        "fp32",
        changed(lambda x: None),
        ["trainer.max_epochs=20"],
        ["the same trainer.max_epochs"],
    ),
    "another seed": ("fp32", changed(lambda x: None), ["seed=5"], ["there seed=0, here seed=5"]),
    "another learning rate": (
        "fp32",
        changed(lambda x: None),
        ["model.learning_rate=1"],
        ["there none of it, here model.learning_rate=1"],
    ),
    "another network": (
        "fp32",
        changed(lambda x: None),
        ["model=resnet18_imagenet_stem"],
        ["another run"],
    ),
    "another qconfig": (
        "qat",
        changed(lambda x: None),
        ["stage=qat", "qconfig=per_tensor_symmetric"],
        ["trained with {'qconfig': 'x86'"],
    ),
    "fewer bits": (
        "qat",
        changed(lambda x: None),
        ["stage=qat", "qconfig=w4a4"],
        ["trained with {'qconfig': 'x86'"],
    ),
    "no optimizer": (
        "fp32",
        changed(lambda x: x.pop("optimizer_states")),
        [],
        ["not the state of a run"],
    ),
    "empty optimizers": (
        "fp32",
        changed(lambda x: x.update(optimizer_states=[])),
        [],
        ["optimizer_states is damaged"],
    ),
    "loops that are none": (
        "fp32",
        changed(lambda x: x.update(loops={})),
        [],
        ["loops is damaged"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_that_cannot_be_continued(
    name: str, refused: Refused, road: Road, tmp_path: Path
) -> None:
    stage, make, args, words = RUNS[name]
    make(tmp_path / "run.ckpt", road.job(stage) / "checkpoints" / "last.ckpt")
    refused(
        *("data=digits", "trainer=cpu", f"ckpt_path={tmp_path}/run.ckpt"),
        *(f"fp32_ckpt={road.fp32_ckpt}" if "stage=qat" in args else f"fp32_ckpt={tmp_path}/x",),
        *args,
        words=words,
    )


def test_weights_alone_are_no_run(refused: Refused, road: Road) -> None:
    words = ["not the state of a run"]
    refused("data=digits", f"ckpt_path={road.fp32_ckpt}", words=words, unchanged=road.output_dir)
