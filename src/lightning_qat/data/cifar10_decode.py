"""Decoders of the three forms CIFAR-10 comes in: bytes of untrusted files to records."""

import io
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from lightning_qat.data.cifar10_records import (
    BATCHES,
    IMAGE_BYTES,
    RECORD_BYTES,
    TEST_BATCH,
    TRAIN_BATCHES,
    Records,
    packed,
)

BINARY_MEMBERS = {f"{name}.bin" for name in BATCHES}
PICKLE_MEMBERS = set(BATCHES)
# "lables" is the package's spelling
TRAIN_LABELS, TEST_LABELS = "train_lables.json", "test_lables.json"
PNG_MEMBERS = {f"{name}.png" for name in BATCHES} | {TRAIN_LABELS, TEST_LABELS}


class _DType:
    """Stands for numpy's."""

    def __init__(self, name: bytes, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for numpy's own, which a pickle may fill with addresses of its choice."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        if dtype.name != b"u1":
            raise ValueError(f"its numbers are {dtype.name}, not bytes")
        order: Any = "F" if by_columns else "C"
        self.content = np.frombuffer(content, np.uint8).reshape(shape, order=order)


_ADMITTED: dict[str, Callable[..., Any] | None] = {
    "_reconstruct": lambda *_: _Array(),  # empty: the pickle then fills it
    "ndarray": None,  # an argument of it
    "dtype": _DType,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays of bytes and plain containers; calls nothing that a pickle may name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.partition(".")[0] == "numpy" and global_name in _ADMITTED:
            return _ADMITTED[global_name]
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, no part of a batch")


def decode_pickle(members: Mapping[str, bytes], name: str) -> Records:
    """Decode `cifar-10-batches-py`: a pickle of Python 2's {b"data": N x 3072, b"labels": list}."""
    content = _ArrayUnpickler(io.BytesIO(members[name]), encoding="bytes").load()
    return packed(content[b"labels"], content[b"data"].content)


def decode_binary(members: Mapping[str, bytes], name: str) -> Records:
    """Decode `cifar-10-batches-bin`: a file is the records themselves."""
    return np.frombuffer(members[f"{name}.bin"], np.uint8).reshape(-1, RECORD_BYTES)


def decode_png(members: Mapping[str, bytes], name: str) -> Records:
    """Decode the npm package: a batch is a picture of 1024 x N, one image a row.

    The labels of all training batches are one list, in which each has an equal share.
    """
    with Image.open(io.BytesIO(members[f"{name}.png"]), formats=["PNG"]) as picture:
        rows = np.asarray(picture)  # N x 1024 x 3
    pixels = rows.transpose(0, 2, 1).reshape(-1, IMAGE_BYTES)
    if name == TEST_BATCH:
        labels = json.loads(members[TEST_LABELS])
    else:
        start = TRAIN_BATCHES.index(name) * len(pixels)
        labels = json.loads(members[TRAIN_LABELS])[start : start + len(pixels)]
    return packed(labels, pixels)
