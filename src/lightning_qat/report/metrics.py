"""metrics.json: written whole or not at all, and what a search makes of it."""

import json
from pathlib import Path
from typing import Any

from lightning_qat.atomic import atomic_path

FILE_NAME = "metrics.json"


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    """Write ``folder/metrics.json``, or leave what was there."""
    with atomic_path(folder / FILE_NAME) as partial:
        partial.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def objective(metrics: dict[str, Any]) -> float | None:
    """The INT8 model's accuracy on the validation images; None where it has none of either.

    The test set must not choose anything, so its accuracy is never an objective.
    """
    return metrics.get("validation", {}).get("accuracy", {}).get("int8")


def read_objective(folder: Path) -> float | None:
    """`objective` of the run in ``folder``; None where it left no metrics.json."""
    file = folder / FILE_NAME
    return objective(json.loads(file.read_text())) if file.exists() else None
