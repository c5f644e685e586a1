"""Unpack the files of pack.py on the GPU machine, without slow imports."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
CACHE_NAME = "cifar10.npz"  # file name of train.py, which checks the official SHA-1 again
SHA1 = "sha1.json"  # of a part's batches
COLUMNS = 20  # images per row of a picture: WebP allows at most 16,383 pixels
SMOKE_IMAGES = 40  # of each batch


class PackError(Exception):
    """The pack is incomplete. The message says what to do."""


def check(pack: Path, root: Path) -> None:
    """Check that no file is missing.

    Raises:
        PackError: a file is missing.
    """
    wanted = [] if (root / CACHE_NAME).exists() else [f"{name}.webp" for name in BATCHES]
    missing = [name for name in ["*.whl", *wanted] if not any(pack.glob(f"*/{name}"))]
    if missing:
        raise PackError(
            f"{pack} lacks {', '.join(missing)}: carry both parts of the pack, as "
            "benchmarks/gpu/README.md shows. Nothing was started."
        )


def wheels(pack: Path, site: Path) -> None:
    """Unpack the wheels. All of them are pure Python."""
    for file in sorted(pack.glob("*/*.whl")):
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(site)


def batch(stem: Path) -> np.ndarray:
    """Return one batch in the official binary layout."""
    labels = np.frombuffer(stem.with_suffix(".labels").read_bytes(), np.uint8)
    with Image.open(stem.with_suffix(".webp")) as picture:
        tiles = np.asarray(picture).reshape(-1, 32, COLUMNS, 32, 3)
    pixels = tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3072)
    return np.concatenate([labels[:, None], pixels], axis=1)


def data(pack: Path, root: Path, smoke: bool = False) -> list[str]:
    """Put CIFAR-10, or a small part of it, into ``root``, where `train.py` looks for it.

    Returns:
        The overrides that make `train.py` accept the small part.

    Raises:
        PackError: a batch is damaged.
    """
    cache = root / CACHE_NAME
    if not cache.exists():
        batches = {name: _checked(next(pack.glob(f"*/{name}.webp"))) for name in BATCHES}
        root.mkdir(parents=True, exist_ok=True)
        partial = root / "cifar10.partial"
        with partial.open("wb") as file:
            np.savez(file, **{n: x[:SMOKE_IMAGES] if smoke else x for n, x in batches.items()})
        partial.replace(cache)
    if not smoke:
        return []
    with np.load(cache) as content:
        digests = [f"{name}:'{_sha1(content[name])}'" for name in BATCHES]
    return ["+data.sha1={" + ",".join(digests) + "}"]


def _checked(stem: Path) -> np.ndarray:
    try:
        records = batch(stem)
        intact = _sha1(records) == json.loads((stem.parent / SHA1).read_text())[stem.stem]
    except Exception:  # damaged pictures make decoders raise almost any exception
        intact = False
    if not intact:
        raise PackError(f"{stem} is damaged: carry {stem.parent.name} again. Nothing was started.")
    return records


def _sha1(records: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(records).data).hexdigest()
