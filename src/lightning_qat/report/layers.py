"""layers.csv: the effect of quantization on each layer."""

import csv
from pathlib import Path
from typing import Any

from lightning_qat.atomic import atomic_path

FILE_NAME = "layers.csv"


def write_layers_csv(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``folder/layers.csv``, worst layer first. After an error, the old file is unchanged.

    Args:
        rows: rows of ``layer_damage``. None is written as an empty cell. Without rows, no file is
            written.
        folder: an existing folder.
    """
    if not rows:
        return
    with atomic_path(folder / FILE_NAME) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
