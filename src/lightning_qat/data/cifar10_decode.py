"""Decode the three forms of CIFAR-10: turn the bytes of untrusted files into records."""

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
# The package spells "labels" as "lables".
TRAIN_LABELS, TEST_LABELS = "train_lables.json", "test_lables.json"
PNG_MEMBERS = {f"{name}.png" for name in BATCHES} | {TRAIN_LABELS, TEST_LABELS}


class _DType:
    """Replace numpy's dtype in a pickle."""

    def __init__(self, name: bytes, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Replace numpy's array in a pickle, because a pickle could fill it with invalid addresses."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        if dtype.name != b"u1":
            raise ValueError(f"its numbers are {dtype.name}, not bytes")
        order: Any = "F" if by_columns else "C"
        self.content = np.frombuffer(content, np.uint8).reshape(shape, order=order)


_ADMITTED: dict[str, Callable[..., Any] | None] = {
    "_reconstruct": lambda *_: _Array(),  # empty at first; the pickle fills it
    "ndarray": None,  # an argument of `_reconstruct`
    "dtype": _DType,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Read arrays of bytes and plain containers. Never call a function that a pickle names."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.partition(".")[0] == "numpy" and global_name in _ADMITTED:
            return _ADMITTED[global_name]
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}, which is not part of a batch"
        )


def decode_pickle(members: Mapping[str, bytes], name: str) -> Records:
    """Decode `cifar-10-batches-py`: a Python 2 pickle of {b"data": N x 3072, b"labels": list}."""
    content = _ArrayUnpickler(io.BytesIO(members[name]), encoding="bytes").load()
    return packed(content[b"labels"], content[b"data"].content)


def decode_binary(members: Mapping[str, bytes], name: str) -> Records:
    """Decode `cifar-10-batches-bin`: a file holds the records themselves."""
    return np.frombuffer(members[f"{name}.bin"], np.uint8).reshape(-1, RECORD_BYTES)


def decode_png(members: Mapping[str, bytes], name: str) -> Records:
    """Decode the npm package: a batch is a picture of 1024 x N pixels, with one image per row.

    One list holds the labels of all training batches. Each batch has an equal part of it.
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
