"""What pack.py has packed, made ready on the GPU machine."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = 20  # as in pack.py
SMOKE_IMAGES = 40  # of each batch


class PackError(Exception):
    """The pack is not whole; the message says what to do."""


def check(pack: Path, root: Path) -> None:
    """Nothing is missing.

    Raises:
        PackError: something is.
    """
    from lightning_qat.data.cifar10_cache import CACHE_NAME
    from lightning_qat.data.cifar10_records import BATCHES

    wanted = [] if (root / CACHE_NAME).exists() else [f"{name}.webp" for name in BATCHES]
    missing = [name for name in ["*.whl", *wanted] if not any(pack.glob(f"*/{name}"))]
    if missing:
        raise PackError(
            f"{pack} lacks {', '.join(missing)}: carry both parts of the pack, as "
            "benchmarks/gpu/README.md shows. Nothing was started."
        )


def wheels(pack: Path, site: Path) -> None:
    """Unpack them; all are of Python alone."""
    for file in sorted(pack.glob("*/*.whl")):
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(site)


def batch(stem: Path) -> np.ndarray:
    """One batch in the official binary layout."""
    labels = np.frombuffer(stem.with_suffix(".labels").read_bytes(), np.uint8)
    with Image.open(stem.with_suffix(".webp")) as picture:
        tiles = np.asarray(picture).reshape(-1, 32, COLUMNS, 32, 3)
    pixels = tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3072)
    return np.concatenate([labels[:, None], pixels], axis=1)


def data(pack: Path, root: Path, smoke: bool, sha1: dict[str, str] | None = None) -> list[str]:
    """Put CIFAR-10, or a little of it, into ``root``, where `train.py` looks for it.

    Returns:
        What `train.py` must be told, to take the little for the whole.

    Raises:
        PackError: a batch is damaged.
    """
    from lightning_qat.atomic import atomic_path
    from lightning_qat.data.cifar10_cache import CACHE_NAME
    from lightning_qat.data.cifar10_records import BATCHES, CIFAR10_SHA1, check_digests

    cache = root / CACHE_NAME
    if not cache.exists():
        try:
            batches = {name: batch(next(pack.glob(f"*/{name}.webp"))) for name in BATCHES}
            check_digests(batches, sha1 or CIFAR10_SHA1)
        except Exception as error:  # damaged pictures make decoders raise nearly anything
            raise PackError(f"{pack} is damaged: {error} Carry both parts again.") from error
        root.mkdir(parents=True, exist_ok=True)
        with atomic_path(cache) as partial, partial.open("wb") as file:
            np.savez(file, **{n: x[:SMOKE_IMAGES] if smoke else x for n, x in batches.items()})
    if not smoke:
        return []
    with np.load(cache) as content:
        digests = {name: hashlib.sha1(content[name].tobytes()).hexdigest() for name in BATCHES}
    return ["+data.sha1={" + ",".join(f"{n}:'{x}'" for n, x in digests.items()) + "}"]
