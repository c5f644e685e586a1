"""metrics.json: written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from lightning_qat.atomic import atomic_path

FILE_NAME = "metrics.json"


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    """Write ``folder/metrics.json``, or leave what was there."""
    with atomic_path(folder / FILE_NAME) as partial:
        partial.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
