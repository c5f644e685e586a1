"""Split a file into parts that are small enough for the GPU machine's output, and join them."""

import hashlib
import json
from pathlib import Path

LARGEST = 16 * 10**6  # bytes of a part; the limit is 16 MiB
INDEX = "weights.json"


def split(file: Path, folder: Path) -> None:
    """Write ``weights.0``, ``weights.1``, ... and ``weights.json`` as the last file."""
    content = file.read_bytes()
    for old in folder.glob("weights.*"):
        old.unlink()
    starts = range(0, len(content), LARGEST)
    for number, start in enumerate(starts):
        (folder / f"weights.{number}").write_bytes(content[start : start + LARGEST])
    index = {
        "name": file.name,
        "parts": len(starts),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / INDEX).write_text(json.dumps(index) + "\n")


def join(folder: Path) -> tuple[str, bytes]:
    """Return the file's name and its content.

    Raises:
        ValueError: a part is missing or damaged.
    """
    index = json.loads((folder / INDEX).read_text())
    files = [folder / f"weights.{number}" for number in range(index["parts"])]
    missing = [file.name for file in files if not file.is_file()]
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    if missing or hashlib.sha256(content).hexdigest() != index["sha256"]:
        what = f"lacks {', '.join(missing)}" if missing else "has a damaged part of the weights"
        raise ValueError(f"{folder} {what}: take what has come back once more.")
    return index["name"], content
