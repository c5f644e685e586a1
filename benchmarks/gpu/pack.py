"""Pack the files that the GPU machine lacks: CIFAR-10 and the wheels for `train.py`.

    python benchmarks/gpu/pack.py outputs/gpu_pack

Makes two folders in it, `1` and `2`, each under 60 MiB, because one call can carry one of them. A
batch of CIFAR-10 is one lossless WebP picture and a file of labels, with the official SHA-1 next to
them. The images come from `--data-root`. If they are not there, they are downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from unpack import COLUMNS, SHA1

from lightning_qat.data.cifar10_cache import build_cache, read_cache
from lightning_qat.data.cifar10_records import BATCHES, CIFAR10_SHA1, Records
from lightning_qat.errors import UserError

ROOT = Path(__file__).parents[2]
PARTS = ("1", "2")
LARGEST = 60 * 2**20  # bytes of a part
WHEELS = ("hydra-core", "omegaconf", "antlr4-python3-runtime")


def save(records: Records, stem: Path) -> None:
    """Write one batch: ``stem``.webp and ``stem``.labels."""
    tiles = records[:, 1:].reshape(-1, COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    picture = Image.fromarray(np.ascontiguousarray(tiles).reshape(-1, COLUMNS * 32, 3))
    picture.save(stem.with_suffix(".webp"), lossless=True, exact=True, quality=75, method=4)
    stem.with_suffix(".labels").write_bytes(records[:, 0].tobytes())


def pack(folder: Path, root: Path, sha1: dict[str, str] = CIFAR10_SHA1) -> None:
    """Write both parts.

    Raises:
        UserError: the folder is not empty, the images are not available, or a part is too large.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name another folder, or delete it.")
    build_cache(root, sha1)
    batches = read_cache(root, sha1)
    assert batches is not None
    for part, names in zip(PARTS, (BATCHES[:3], BATCHES[3:]), strict=True):
        (folder / part).mkdir(parents=True)
        for name in names:
            save(batches[name], folder / part / name)
        (folder / part / SHA1).write_text(json.dumps({name: sha1[name] for name in names}))
    wheels(folder / PARTS[-1])
    for part in PARTS:
        size = sum(file.stat().st_size for file in (folder / part).iterdir())
        if size >= LARGEST:
            raise UserError(f"{folder / part} has {size:,} bytes, more than a call can carry.")
        print(f"{folder / part}: {size / 2**20:.1f} MiB")


def wheels(folder: Path) -> None:
    """Make the wheels of the versions that are tested together. pip builds missing wheels.

    Raises:
        UserError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    done = subprocess.run(
        [*command, "-c", ROOT / "constraints.txt", *WHEELS], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError("The wheels could not be made:\n" + done.stderr[-2000:])


def main() -> None:
    """Pack the files, or print why this is impossible."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="which gets the parts; ignored by git")
    default = os.environ.get("CIFAR10_ROOT", "~/.cache/lightning_qat/cifar10")
    parser.add_argument("--data-root", type=Path, default=default)
    args = parser.parse_args()
    pack(args.folder, args.data_root.expanduser())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
