"""metrics.json: written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.json"


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    """Write ``folder/metrics.json``."""
    write_json(metrics, folder / FILE_NAME)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file, or leave what was there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
