"""Read the decoded copy of CIFAR-10 on disk and check it, or make it again."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock

from lightning_qat.data.cifar10_records import BATCHES, Records, check_digests
from lightning_qat.data.cifar10_source import DOWNLOAD_PREFIX, obtain
from lightning_qat.errors import UserError

log = logging.getLogger(__name__)

CACHE_NAME = "cifar10.npz"


def build_cache(root: Path, sha1: Mapping[str, str]) -> None:
    """Make the cache in `root`, unless there is an intact cache.

    If several processes call this at once, one of them works and the others wait.

    Raises:
        UserError: no source has the images, a source has wrong images, or `root` cannot be written.
    """
    if read_cache(root, sha1) is not None:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{CACHE_NAME}.lock"):
            for left in root.glob(f"{DOWNLOAD_PREFIX}*"):  # left by a killed process
                shutil.rmtree(left, ignore_errors=True)
            if read_cache(root, sha1) is None:
                _write(root / CACHE_NAME, obtain(root, sha1))
    except OSError as error:
        raise UserError(
            f"CIFAR-10 cannot be kept in {root}: {error}. Free some space there (the cache needs "
            "185 MB, and a download needs the same again), make the folder writable, or name "
            "another one with data.root=... or the environment variable CIFAR10_ROOT."
        ) from error


def read_cache(root: Path, sha1: Mapping[str, str]) -> dict[str, Records] | None:
    """Read the six batches. Return None if the cache is missing, damaged, or holds other images.

    Raises:
        UserError: the cache exists, but its file permissions do not allow reading.
    """
    path = root / CACHE_NAME
    try:
        with np.load(path, allow_pickle=False) as content:
            batches = {name: content[name] for name in BATCHES}
        check_digests(batches, sha1)
        return batches
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(
            f"The CIFAR-10 cache cannot be read: {error}. Make {path} a readable file, delete it, "
            "or name another folder with data.root=... or the environment variable CIFAR10_ROOT."
        ) from error
    except Exception as error:  # damaged zip files make numpy raise almost any exception
        log.warning("The CIFAR-10 cache %s is damaged and will be made again: %s", path, error)
        return None


def _write(path: Path, batches: Mapping[str, Records]) -> None:
    """Write the cache completely or not at all."""
    # The caller holds the lock, so the fixed name lets this file replace a killed process's file.
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **batches)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
