"""Damaged, hostile or wrong data files are named in the message, and no files remain."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_qat.data import CIFAR10DataModule, FolderDataModule
from lightning_qat.data.cifar10_files import LARGEST_MEMBER
from lightning_qat.errors import UserError
from tests.bad_input.conftest import state
from tests.conftest import Train
from tests.data.cifar10_archives import (
    Batches,
    binary_members,
    npm_members,
    python2_pickle,
    python_members,
    write_archive,
    write_folder,
)

Spoil = Callable[[Path, Batches], object]


def binary(root: Path, batches: Batches, **changes: bytes) -> Path:
    """Write the binary archive, with other content in some of its batches."""
    named = {f"cifar-10-batches-bin/{name}.bin": content for name, content in changes.items()}
    return write_archive(root / "cifar-10-binary.tar.gz", binary_members(batches) | named)


def python(root: Path, batches: Batches, content: object) -> None:
    spoilt = {"cifar-10-batches-py/test_batch": python2_pickle(content)}
    write_archive(root / "cifar-10-python.tar.gz", python_members(batches) | spoilt)


def labels_beyond(root: Path, batches: Batches) -> None:
    records = batches["test_batch"].copy()
    records[0, 0] = 200
    binary(root, batches, test_batch=records.tobytes())


def labels_beyond_a_byte(root: Path, batches: Batches) -> None:
    python(root, batches, {"labels": [300] * 20, "data": batches["test_batch"][:, 1:].copy()})


def too_few_labels(root: Path, batches: Batches) -> None:
    python(root, batches, {"labels": [1], "data": batches["test_batch"][:, 1:].copy()})


def pixels_of_another_size(root: Path, batches: Batches) -> None:
    python(root, batches, {"labels": [1] * 20, "data": batches["test_batch"][:, 1:100].copy()})


def linked(kind: bytes) -> Spoil:
    """Write a member that is a link to a file outside the archive."""

    def spoil(root: Path, batches: Batches) -> None:
        members = binary_members(batches)
        del members["cifar-10-batches-bin/test_batch.bin"]
        path = write_archive(root / "plain.tar.gz", members)
        with (
            tarfile.open(path) as plain,
            tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as archive,
        ):
            for entry in plain:
                archive.addfile(entry, plain.extractfile(entry))
            link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
            link.type, link.linkname = kind, str(root / "secret")
            archive.addfile(link)
        path.unlink()
        (root / "secret").write_bytes(batches["test_batch"].tobytes())

    return spoil


def tar_bomb(root: Path, batches: Batches) -> None:
    """Write a few kilobytes that unpack to more than any batch."""
    binary(root, batches, data_batch_1=bytes(LARGEST_MEMBER + 1))


def header_bomb(root: Path, batches: Batches) -> None:
    """Write a header that claims eight gigabytes for the name of its member."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**33
    content = header.tobuf(tarfile.GNU_FORMAT)
    (root / "cifar-10-python.tar.gz").write_bytes(gzip.compress(content))


class Array:
    """An object whose pickle makes numpy build an array from addresses."""

    def __reduce__(self) -> Any:
        return np.ndarray, ((1,), np.dtype("O"), bytes(8))


def unfolding_labels(root: Path, batches: Batches) -> None:
    labels: list[Any] = [1] * 10
    for _ in range(12):
        labels = [labels] * 10
    python(root, batches, {"labels": labels, "data": batches["test_batch"][:, 1:].copy()})


def folder_bomb(root: Path, batches: Batches) -> None:
    write_folder(root, binary_members(batches))
    with (root / "cifar-10-batches-bin" / "data_batch_1.bin").open("r+b") as file:
        file.truncate(2**40)  # a sparse file


def pipe_in_the_folder(root: Path, batches: Batches) -> None:
    write_folder(root, binary_members(batches))
    (root / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    os.mkfifo(root / "cifar-10-batches-bin" / "test_batch.bin")


CIFAR10: dict[str, tuple[Spoil, str]] = {
    "text": (lambda r, b: (r / "cifar-10-python.tar.gz").write_text("no"), "cannot be read as CIF"),
    "empty": (lambda r, b: (r / "cifar-10-python.tar.gz").touch(), "cannot be read as CIFAR-10"),
    "pipe": (lambda r, b: os.mkfifo(r / "cifar-10-python.tar.gz"), "neither a file nor a folder"),
    "no member": (lambda r, b: write_archive(r / "cifar-10-binary.tar.gz", {}), "not in it"),
    "one record cut": (
        lambda r, b: binary(r, b, test_batch=b["test_batch"].tobytes()[:-1]),
        "test_batch cannot be read",
    ),
    "one record less": (
        lambda r, b: binary(r, b, test_batch=b["test_batch"][:-1].tobytes()),
        "test_batch does not hold the official",
    ),
    "label out of range": (labels_beyond, "test_batch does not hold the official"),
    "label above a byte": (labels_beyond_a_byte, "test_batch cannot be read"),
    "too few labels": (too_few_labels, "test_batch cannot be read"),
    "pixels of another size": (pixels_of_another_size, r"uint8 \(20, 99\), not uint8"),
    "no pixels": (lambda r, b: python(r, b, {"labels": [1] * 20}), "test_batch cannot be read"),
    "a list for a batch": (lambda r, b: python(r, b, [1, 2]), "test_batch cannot be read"),
    "symbolic link": (linked(tarfile.SYMTYPE), "cannot be read as CIFAR-10"),
    "hard link": (linked(tarfile.LNKTYPE), "cannot be read as CIFAR-10"),
    "device": (linked(tarfile.CHRTYPE), "test_batch.bin not in it"),
    "an array of addresses": (
        lambda r, b: python(r, b, {"labels": Array(), "data": []}),
        "test_batch cannot be read .*not callable",
    ),
    "wider numbers": (
        lambda r, b: python(r, b, {"labels": [], "data": b["test_batch"].astype(np.uint16)}),
        "test_batch cannot be read .*not bytes",
    ),
    "labels that unfold to terabytes": (unfolding_labels, "test_batch cannot be read"),
    "header bomb": (header_bomb, "it unpacks to more than any archive"),
    "tar bomb": (tar_bomb, "data_batch_1.bin has 40000001 bytes, more than any"),
    "sparse file": (folder_bomb, "data_batch_1.bin has 1099511627776 bytes, more than any"),
    "pipe in the folder": (pipe_in_the_folder, "test_batch.bin is no file"),
}


@pytest.mark.parametrize("name", CIFAR10)
def test_wrong_files_of_cifar10_are_named(
    name: str, root: Path, batches: Batches, sha1: dict[str, str]
) -> None:
    spoil, words = CIFAR10[name]
    spoil(root, batches)
    before = state(root)
    with pytest.raises(UserError, match=f"{root}/cifar-10-.*{words}.*Delete it"):
        CIFAR10DataModule(root, sha1=sha1).prepare_data()
    after = {path: x for path, x in state(root).items() if path.suffix != ".lock"}
    assert after == before


def test_a_secret_that_a_link_leads_to_would_have_been_the_batch(
    root: Path, batches: Batches, sha1: dict[str, str]
) -> None:
    linked(tarfile.SYMTYPE)(root, batches)
    content = (root / "secret").read_bytes()
    (root / "cifar-10-binary.tar.gz").unlink()
    binary(root, batches, test_batch=content)
    CIFAR10DataModule(root, sha1=sha1).prepare_data()


def png(*shape: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


NPM: dict[str, tuple[dict[str, bytes], str]] = {
    "picture of another width": ({"test_batch.png": png(20, 512)}, "test_batch cannot be read"),
    "picture of another height": ({"test_batch.png": png(19, 1024)}, "test_batch cannot be read"),
    "no picture": ({"data_batch_2.png": b"<svg/>"}, "data_batch_2 cannot be read"),
    "short label list": ({"train_lables.json": json.dumps([1] * 99).encode()}, "data_batch_5 can"),
    "label words": ({"test_lables.json": b'["cat"]'}, "test_batch cannot be read"),
    "label mapping": ({"test_lables.json": b"{}"}, "test_batch cannot be read"),
    "labels cut off": ({"train_lables.json": b"[1, 2,"}, "data_batch_1 cannot be read"),
    "other labels": ({"test_lables.json": json.dumps([3] * 20).encode()}, "does not hold the off"),
    "endless label list": ({"test_lables.json": b"[" * 100_000}, "test_batch cannot be read"),
}


@pytest.mark.parametrize("name", NPM)
def test_a_wrong_npm_package_is_refused(
    name: str,
    root: Path,
    tmp_path: Path,
    batches: Batches,
    sha1: dict[str, str],
    npm_calls: Path,
) -> None:
    changes, words = NPM[name]
    spoilt = {f"package/{file}": content for file, content in changes.items()}
    write_archive(tmp_path / "package.tgz", npm_members(batches) | spoilt)
    with pytest.raises(UserError, match=words):
        CIFAR10DataModule(root, sha1=sha1).prepare_data()
    assert {path.name for path in root.iterdir()} <= {"cifar10.npz.lock"}


def test_the_command_line_says_so_too(train: Train, tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"not an archive")
    status, printed = train("stage=fp32", f"data.root={tmp_path}")
    assert status == 2, printed
    assert str(archive) in printed.replace("\n", "")
    assert "Traceback" not in printed
    assert archive.read_bytes() == b"not an archive"


def image(path: Path, width: int = 8, height: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "red").save(path)
    return path


def without_classes(root: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name / "0.png").unlink()
            (root / part / name).rmdir()


def one_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "b" / "0.png").unlink()
        (root / part / "b").rmdir()


def strip(root: Path) -> None:
    image(root / "train" / "a" / "1.png", 1, 60_000)


def bomb(root: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(root / "train" / "a" / "1.png")


def only_text_files(root: Path) -> None:
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "0.txt")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
FOLDER: dict[str, tuple[Callable[[Path], object], str]] = {
    "no classes": (without_classes, r"train holds no class folders.*root/train/<class>/"),
    "one class": (one_class, r"one class only, a.*root/train/<class>/"),
    "no file of a known kind": (only_text_files, r"for the classes a\..*Add images"),
    "class in train only": (lambda r: image(r / "train" / "c" / "0.png"), "classes c are in only"),
    "text named .png": (lambda r: (r / "test/b/1.png").write_text("no"), "1.png is no image"),
    "empty image": (lambda r: (r / "test/b/1.png").touch(), "1.png is no image"),
    "pipe": (lambda r: os.mkfifo(r / "train/b/1.png"), "1.png cannot be read: It is a pipe"),
    "link to nowhere": (
        lambda r: (r / "train/b/1.png").symlink_to("nowhere"),
        "1.png cannot be read: No such file",
    ),
    "decompression bomb": (bomb, "1.png is too large an image"),
    "strip": (strip, "1.png cannot be decoded.*too long and narrow"),
    "program": (lambda r: (r / "train/a/1.png").write_bytes(POSTSCRIPT), "1.png is no image"),
}


@pytest.mark.parametrize("name", FOLDER)
def test_wrong_images_of_ones_own_are_named(name: str, tmp_path: Path) -> None:
    spoil, words = FOLDER[name]
    for file in ("train/a", "train/b", "test/a", "test/b"):
        image(tmp_path / file / "0.png")
    FolderDataModule(tmp_path, image_size=1024).load()  # a valid folder
    spoil(tmp_path)
    before = state(tmp_path)
    with pytest.raises(UserError, match=words):
        FolderDataModule(tmp_path, image_size=1024).load()
    assert state(tmp_path) == before


def test_postscript_would_be_run_by_pillow_as_it_is() -> None:
    """Check that Pillow would run PostScript. Otherwise the case above proves nothing."""
    with Image.open(io.BytesIO(POSTSCRIPT)) as file:
        assert file.format == "EPS"
