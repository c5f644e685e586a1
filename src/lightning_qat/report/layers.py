"""layers.csv: what quantization does to each layer."""

import csv
from pathlib import Path
from typing import Any

from lightning_qat.atomic import atomic_path

FILE_NAME = "layers.csv"


def write_layers_csv(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``folder/layers.csv``, worst layer first, or leave what was there.

    Args:
        rows: as ``layer_damage`` gives them; None is written as an empty cell. No rows, no file.
        folder: exists.
    """
    if not rows:
        return
    with atomic_path(folder / FILE_NAME) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
