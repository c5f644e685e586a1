"""Find files that belong to a run: its training curves, and the PTQ run to compare it with."""

import csv
import json
import math
import shlex
from pathlib import Path
from typing import Any

from lightning_qat.report.metrics import FILE_NAME

Curve = tuple[list[int], list[float]]  # steps, values

# A QAT run and a PTQ run must share these, so that they differ only in the method.
_SAME = ("data", "model", "qconfig", "seed", "weights_sha256")
_SAME_ARGUMENTS = ("overrides=", "only=", "qconfig.", "allow_saturation=")

# Arguments that a run of another stage does not take over.
_OF_ONE_RUN = (
    "stage=",
    "ckpt_path=",
    "callbacks.result.",
    "model.weights=",
    "trainer.max_epochs=",
    "trainer.limit_train_batches=",
)


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves that Lightning's CSVLogger wrote to ``folder/csv``, by their names."""
    curves: dict[str, Curve] = {}
    path = folder / "csv" / "metrics.csv"
    if not path.exists():
        return curves
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("step", "epoch") and math.isfinite(float(text)):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(text))
    return curves


def find_ptq(metrics: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the metrics of the newest finished PTQ run of the same network.

    Search the folders beside the run, and ``runs/*`` and ``multiruns/*/*`` of the output folder.
    """
    folder = folder.resolve()
    patterns = [(folder.parent, "*")]
    for output_dir in folder.parents[1:3]:  # of output_dir/runs/RUN and output_dir/multiruns/*/RUN
        patterns += [(output_dir, "runs/*"), (output_dir, "multiruns/*/*")]
    found = {path for root, runs in patterns for path in root.glob(f"{runs}/{FILE_NAME}")}
    for path in sorted(found, key=lambda path: (path.stat().st_mtime, path), reverse=True):
        try:
            other = json.loads(path.read_text())
        except (OSError, ValueError):  # written by another program, or deleted since
            continue
        if _comparable(other, metrics):
            return path.parent, other
    return None


def _comparable(other: Any, metrics: dict[str, Any]) -> bool:
    if not isinstance(other, dict) or other.get("stage") != "ptq" or other.get("status") != 0:
        return False
    same_arguments = _deciding_arguments(other) == _deciding_arguments(metrics)
    return same_arguments and all(other.get(key) == metrics.get(key) for key in _SAME)


def _deciding_arguments(metrics: dict[str, Any]) -> set[str]:
    return {word for word in shlex.split(metrics["command"]) if word.startswith(_SAME_ARGUMENTS)}


def command_for(stage: str, metrics: dict[str, Any]) -> str:
    """Return the command of a run with another stage."""
    words = shlex.split(metrics["command"])[2:]
    others = [word for word in words if not word.lstrip("+~").startswith(_OF_ONE_RUN)]
    return shlex.join(["python", "train.py", f"stage={stage}", *others])
