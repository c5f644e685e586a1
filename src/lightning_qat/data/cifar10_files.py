"""Read CIFAR-10 from its published folders and archives."""

import gzip
import tarfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from lightning_qat.data.cifar10_decode import (
    BINARY_MEMBERS,
    PICKLE_MEMBERS,
    PNG_MEMBERS,
    decode_binary,
    decode_pickle,
    decode_png,
)
from lightning_qat.data.cifar10_records import BATCHES, Records, WrongContentError
from lightning_qat.data.progress import progress_bar


@dataclass(frozen=True)
class Form:
    """Members of a published folder, or of the same folder in an archive."""

    folder: str
    members: Collection[str]
    decode_batch: Callable[[Mapping[str, bytes], str], Records]


LARGEST_MEMBER = 40_000_000
"""Largest size of a member in bytes. A batch has 31 million. An archive may claim gigabytes."""

LARGEST_ARCHIVE = 8 * LARGEST_MEMBER
"""Bytes of an unpacked archive. The official archives have 186 million."""

PYTHON = Form("cifar-10-batches-py", PICKLE_MEMBERS, decode_pickle)
BINARY = Form("cifar-10-batches-bin", BINARY_MEMBERS, decode_binary)
NPM = Form("package", PNG_MEMBERS, decode_png)

LOCAL_SOURCES = {
    PYTHON.folder: PYTHON,
    BINARY.folder: BINARY,
    "cifar-10-python.tar.gz": PYTHON,
    "cifar-10-binary.tar.gz": BINARY,
}
"""Names of the files and folders that a user may put into the root."""


def find_local(root: Path) -> tuple[Path, Form] | None:
    """Find an official folder, else an official archive, in `root`."""
    for name, form in LOCAL_SOURCES.items():
        if (root / name).exists():
            return root / name, form
    return None


def decode(path: Path, form: Form) -> dict[str, Records]:
    """Decode all six batches of a folder or archive. Their digests are not checked here.

    Raises:
        WrongContentError: the file is damaged, incomplete, unreadable or has another form.
    """
    batches = {}
    reading = "it"
    with progress_bar() as progress:
        try:
            read = _read_folder if path.is_dir() else _read_archive
            members = read(path, form, progress)
            for reading in progress.track(BATCHES, description=f"Decoding {path.name}"):
                batches[reading] = form.decode_batch(members, reading)
        except Exception as error:  # bad bytes make decoders raise almost any exception
            raise WrongContentError(
                f"{reading} cannot be read as CIFAR-10: {type(error).__name__}: {error}."
            ) from error
    return batches


def _refuse_too_large(name: str, size: int) -> None:
    if size > LARGEST_MEMBER:
        raise ValueError(f"{name} has {size} bytes, more than any file of CIFAR-10")


def _read_folder(path: Path, form: Form, progress: Progress) -> dict[str, bytes]:
    names = progress.track(sorted(form.members), description=f"Reading {path.name}")
    for name in form.members:
        # a pipe, for example, would never end
        if (path / name).exists() and not (path / name).is_file():
            raise ValueError(f"{name} is no file")
        _refuse_too_large(name, (path / name).stat().st_size)
    return {name: (path / name).read_bytes() for name in names}


class _Unpacked(gzip.GzipFile):
    """Unpack at most LARGEST_ARCHIVE bytes, because tarfile reads a header of any claimed length.

    Raises:
        ValueError: the reader asks for more bytes.
    """

    left = LARGEST_ARCHIVE

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise ValueError("it unpacks to more than any archive of CIFAR-10")
        self.left -= size
        return super().read(size)


def _read_archive(path: Path, form: Form, progress: Progress) -> dict[str, bytes]:
    """Read the members into memory. The disk is not written, so that no member name can do harm."""
    if not path.is_file():
        raise ValueError("it is neither a file nor a folder")
    members = {}
    expected = {f"{form.folder}/{name}": name for name in form.members}
    with (
        progress.open(path, "rb", description=f"Reading {path.name}") as packed,
        _Unpacked(fileobj=packed) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r:") as archive,
    ):
        for entry in archive:
            if entry.name in expected and (content := archive.extractfile(entry)):
                _refuse_too_large(entry.name, entry.size)
                members[expected[entry.name]] = content.read()
    if missing := sorted(set(form.members) - set(members)):
        raise ValueError(f"{', '.join(missing)} not in it")
    return members
