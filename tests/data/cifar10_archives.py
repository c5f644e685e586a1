"""Small CIFAR-10 archives in every published form."""

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGES_PER_BATCH = 20
TRAIN_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
Batches = dict[str, NDArray[np.uint8]]


class Python2Pickler(pickle._Pickler):
    """Write every string like Python 2, which wrote the official files."""

    write: Callable[[bytes], None]

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        short = len(content) < 256
        opcode, length = (b"U", "<B") if short else (b"T", "<i")
        self.write(opcode + struct.pack(length, len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(content: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python_members(batches: Batches) -> dict[str, bytes]:
    members = {
        f"cifar-10-batches-py/{name}": python2_pickle(
            {"batch_label": name, "labels": records[:, 0].tolist(), "data": records[:, 1:].copy()}
        )
        for name, records in batches.items()
    }
    return members | {"cifar-10-batches-py/readme.html": b"not read"}


def binary_members(batches: Batches) -> dict[str, bytes]:
    return {f"cifar-10-batches-bin/{n}.bin": records.tobytes() for n, records in batches.items()}


def npm_members(batches: Batches) -> dict[str, bytes]:
    members = {"package/package.json": b"{}", "package/index.bundle.js": b"throw new Error()"}
    for name, records in batches.items():
        pixels = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
        members[f"package/{name}.png"] = buffer.getvalue()
    train = np.concatenate([batches[name][:, 0] for name in TRAIN_BATCHES])
    members["package/train_lables.json"] = json.dumps(train.tolist()).encode()
    members["package/test_lables.json"] = json.dumps(batches["test_batch"][:, 0].tolist()).encode()
    return members


def write_archive(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_folder(root: Path, members: Mapping[str, bytes]) -> None:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


PUBLISH: dict[str, Callable[[Path, Batches], Any]] = {
    "python folder": lambda root, b: write_folder(root, python_members(b)),
    "binary folder": lambda root, b: write_folder(root, binary_members(b)),
    "python archive": lambda root, b: write_archive(
        root / "cifar-10-python.tar.gz", python_members(b)
    ),
    "binary archive": lambda root, b: write_archive(
        root / "cifar-10-binary.tar.gz", binary_members(b)
    ),
}
