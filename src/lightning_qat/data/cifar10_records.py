"""The official binary layout of CIFAR-10. The images of every source are checked in this layout."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
BATCHES = (*TRAIN_BATCHES, TEST_BATCH)

CIFAR10_SHA1 = {
    "data_batch_1": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch": "67eb016db431130d61cd03c7ad570b013799c88c",
}
"""SHA-1 digests of the official binary files."""

IMAGE_BYTES = 3 * 32 * 32
RECORD_BYTES = 1 + IMAGE_BYTES

Records = NDArray[np.uint8]
"""N x 3073: the label of each image, then its pixels in the order channel, height, width."""


class WrongContentError(Exception):
    """A source does not hold the official images. The message says why, without the path."""


def packed(labels: Sequence[int] | NDArray[np.uint8], pixels: NDArray[np.uint8]) -> Records:
    """Make records from N labels and N x 3072 pixels.

    Raises:
        ValueError: the shapes or the dtype do not match.
    """
    if pixels.ndim != 2 or pixels.shape[1] != IMAGE_BYTES or pixels.dtype != np.uint8:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (N, {IMAGE_BYTES})")
    # np.asarray would accept nested lists.
    column = np.frombuffer(bytes(list(labels)), np.uint8)
    return np.concatenate([column[:, None], pixels], axis=1)


def unpacked(batches: Sequence[Records]) -> tuple[Tensor, Tensor]:
    """Join batches into images, uint8 N x 32 x 32 x 3, and labels, int64 N."""
    images = np.empty((sum(map(len, batches)), 32, 32, 3), np.uint8)
    start = 0
    for records in batches:
        pixels = records[:, 1:].reshape(-1, 3, 32, 32)
        images[start : start + len(records)] = pixels.transpose(0, 2, 3, 1)
        start += len(records)
    labels = np.concatenate([records[:, 0] for records in batches]).astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)


def check_digests(batches: Mapping[str, Records], sha1: Mapping[str, str]) -> None:
    """Compare the digest of every batch with the official digest.

    Raises:
        WrongContentError: a batch is not the official batch.
    """
    for name in BATCHES:
        content = np.ascontiguousarray(batches[name]).data
        found = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        if found != sha1[name]:
            raise WrongContentError(
                f"{name} does not hold the official CIFAR-10 images: the SHA-1 of its binary "
                f"layout is {found}, expected {sha1[name]}."
            )
