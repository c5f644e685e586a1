"""Make the tables of `training.py`."""

import json
import statistics
from pathlib import Path
from typing import Any

from record import RESULTS, full_table, origin_in_words

# title of the comparison, loop of train.py, loop of the tutorial
RACES = {
    "fp32": ("FP32", "ours_fp32", "origin_fp32"),
    "qat": ("QAT, the tutorial with fake quantization", "ours_qat", "origin_qat_mended"),
    "qat_as_written": ("QAT, the tutorial as written", "ours_qat", "origin_qat_as_written"),
    "step_fp32": ("steps alone, FP32", "ours_step_fp32", "origin_step_fp32"),
    "step_qat": ("steps alone, QAT", "ours_step_qat", "origin_step_qat"),
    "data": ("data path alone", "ours_data", "origin_data"),
}
NOT_MEASURED = "not measured yet"


def training_summary(folder: Path = RESULTS) -> str:
    """Return a table for each model and device that has a result."""
    parts = []
    for file in sorted(folder.glob("training_*.json")):
        result = json.loads(file.read_text())
        parts.append(f"{ratio_table(result)}\n\n{measured_how(result)} {full_table(file)}")
    return "\n\n".join(parts) or NOT_MEASURED


def ratio_table(result: dict[str, Any]) -> str:
    """Return the speed of this project / the tutorial, with images/s if a GPU measured them."""
    on_gpu = result["device"] != "cpu"
    heads = [result["model"], "images/s, tutorial = 1", "range of the rounds"]
    lines = [heads + ["images/s", "tutorial's"] * on_gpu, ["---"] * (5 if on_gpu else 3)]
    for race, (title, *pair) in RACES.items():
        ratio = result["ratios"][race]
        cells = [title, f"{ratio['p50']:.2f}x", f"{ratio['min']:.2f} to {ratio['max']:.2f}"]
        if on_gpu:
            rates = [result["loops"][name]["images_per_second"] for name in pair]
            cells += [f"{statistics.median(rate):,.0f}" for rate in rates]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measured_how(result: dict[str, Any]) -> str:
    """Return the settings, command and versions of a result."""
    device = "" if result["device"] == "cpu" else f"{result['device']}, "
    return (
        f"Batch {result['batch_size']}, {result['rounds']} rounds of {result['steps']} steps, the "
        f"tutorial's loader with {result['workers']} workers (8 in the tutorial), {device}"
        f"{origin_in_words(result)}"
    )
