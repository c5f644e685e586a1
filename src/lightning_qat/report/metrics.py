"""Write metrics.json completely or not at all, and read the objective of a search from it."""

import json
from pathlib import Path
from typing import Any

from lightning_qat.atomic import atomic_path

FILE_NAME = "metrics.json"


def write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    """Write ``folder/metrics.json``. After an error, the old file is unchanged."""
    with atomic_path(folder / FILE_NAME) as partial:
        partial.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def objective(metrics: dict[str, Any]) -> float | None:
    """Return the INT8 model's accuracy on the validation images, or None if it does not exist.

    The test set must not choose anything, so its accuracy is never an objective.
    """
    return metrics.get("validation", {}).get("accuracy", {}).get("int8")


def read_objective(folder: Path) -> float | None:
    """Return the `objective` of the run in ``folder``, or None if there is no metrics.json."""
    file = folder / FILE_NAME
    return objective(json.loads(file.read_text())) if file.exists() else None
