"""Continue the curves of a resumed run."""

import csv
import warnings
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from lightning_qat.quantization.checkpoints import read_checkpoint

_FILE = ExperimentWriter.NAME_METRICS_FILE
_KEPT = "before_the_break.csv"


class CurvesLogger(CSVLogger):
    """A CSVLogger that keeps the rows from before the break.

    Lightning's CSVLogger deletes an existing file in the folder, even if the same run wrote it.

    Args:
        resumed_from: `last.ckpt` in `checkpoints/`, the folder beside `csv/`. None = a new run.
        arguments: arguments of CSVLogger.
    """

    def __init__(self, resumed_from: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._resumed_from = resumed_from

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Return the writer of the file."""
        if self._experiment is not None or self._resumed_from is None:
            return super().experiment
        checkpoint = Path(self._resumed_from)
        rows = _rows_before(checkpoint)
        own, kept = Path(self.log_dir) / _FILE, Path(self.log_dir) / _KEPT
        if own.exists() and not kept.exists():
            own.replace(kept)  # the rows stay on the disk at every moment
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning warns that it will delete the file
            writer = super().experiment
        writer.metrics.extend(rows)
        writer.save()
        kept.unlink(missing_ok=True)
        return writer


def _rows_before(checkpoint: Path) -> list[dict[str, Any]]:
    folder = checkpoint.resolve().parents[1] / "csv"
    file = next((folder / name for name in (_KEPT, _FILE) if (folder / name).exists()), None)
    if file is None:
        return []
    steps = read_checkpoint(checkpoint, "name another checkpoint.")["global_step"]
    text = file.read_text()
    whole_lines = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
    rows = [
        row
        for row in csv.DictReader(whole_lines.splitlines())
        # None = more columns than names: an interrupted run did not write the new names.
        if None not in row and row.get("step") and int(row["step"]) < steps
    ]
    return [{name: value for name, value in row.items() if value} for row in rows]
