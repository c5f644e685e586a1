"""The curves of a run, which go on where it is resumed."""

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
    """A CSVLogger that begins with the rows of before the break.

    Lightning's deletes the file that lies in the folder, also where it is that of the same run.

    Args:
        resumed_from: `last.ckpt` in `checkpoints/`, which lies beside `csv/`; None = a new run.
        arguments: those of CSVLogger.
    """

    def __init__(self, resumed_from: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._resumed_from = resumed_from

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file."""
        if self._experiment is not None or self._resumed_from is None:
            return super().experiment
        checkpoint = Path(self._resumed_from)
        rows = _rows_before(checkpoint)
        own, kept = Path(self.log_dir) / _FILE, Path(self.log_dir) / _KEPT
        if own.exists() and not kept.exists():
            own.replace(kept)  # so that the rows are somewhere at any moment
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file will be deleted
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
    steps = read_checkpoint(checkpoint, "name another one.")["global_step"]
    text = file.read_text()
    whole_lines = text[: text.rfind("\n") + 1]  # the run may have been killed while it wrote one
    rows = [
        row
        for row in csv.DictReader(whole_lines.splitlines())
        # None: more columns than names, which an interrupted run had no time to write
        if None not in row and row.get("step") and int(row["step"]) < steps
    ]
    return [{name: value for name, value in row.items() if value} for row in rows]
