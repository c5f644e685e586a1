"""The table at the end of a multirun, and its exit status."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_qat import cli
from lightning_qat.report.metrics import FILE_NAME

log = logging.getLogger(__name__)

# Title in the printed table -> columns of sweep.csv, two of them as "FP32→INT8".
COLUMNS = {
    "stage": ["stage"],
    "qconfig": ["qconfig"],
    "seed": ["seed"],
    "FP32": ["accuracy.fp32"],
    "fake-quant": ["accuracy.fake_quant"],
    "INT8": ["accuracy.int8"],
    "agree": ["agreement.int8_vs_fake_quant"],
    "MB": ["size_bytes.fp32", "size_bytes.int8"],
    "ms": ["latency_ms.fp32_eager.p50", "latency_ms.int8_torchscript.p50"],
}


class SweepReport(Callback):
    """Reads what the jobs have left, whichever launcher ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write sweep.csv, print the table, end with the worst status of the jobs."""
        folder = Path(config.hydra.sweep.dir)
        rows = [_read_job(job) for job in _job_folders(folder)]
        status = cli.worst(int(row["status"]) for row in rows)
        try:
            self._report(rows, folder)
        except Exception:  # Hydra would turn it into a warning, and the status into 0
            log.exception("the report of the sweep could not be made")
            status = cli.OUR_FAULT
        cli.end(status)

    @staticmethod
    def _report(rows: list[dict[str, Any]], folder: Path) -> None:
        first = ["job", *(name for names in COLUMNS.values() for name in names)]
        others = sorted({name for row in rows for name in row} - set(first))
        with (folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*first, *others])
            writer.writeheader()
            writer.writerows(rows)
        _print(rows)


def _job_folders(folder: Path) -> list[Path]:
    jobs = [path.parent.parent for path in folder.glob("*/.hydra/hydra.yaml")]
    return sorted(jobs, key=_job_number)


def _job_number(job: Path) -> int:
    return int(OmegaConf.load(job / ".hydra" / "hydra.yaml").hydra.job.num)


def _read_job(job: Path) -> dict[str, Any]:
    """One row: the job's metrics by dotted name, or its failure."""
    overrides = OmegaConf.load(job / ".hydra" / "overrides.yaml")
    row = {"job": _job_number(job), "overrides": " ".join(str(x) for x in overrides)}
    failure = job / cli.FAILURE_FILE
    if failure.exists():
        return row | json.loads(failure.read_text())
    if not (job / FILE_NAME).exists():
        return row | {"status": 1, "message": f"the job left neither {FILE_NAME} nor a message"}
    return row | _flatten(json.loads((job / FILE_NAME).read_text()))


def _flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _print(rows: list[dict[str, Any]]) -> None:
    done = [row for row in rows if not row["status"]]
    console = Console()
    if done:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # to fit into 80 columns
        for title in COLUMNS:
            words = title in ("stage", "qconfig")
            table.add_column(
                title,
                justify="left" if words else "right",
                no_wrap=not words,
                min_width=len(title),
            )
        for row in done:
            table.add_row(
                *(
                    "→".join(filter(None, (_cell(name, row.get(name)) for name in names)))
                    for names in COLUMNS.values()
                )
            )
        console.print(table)
        console.print(
            "MB, ms: FP32→INT8. ms: median of one image on one thread, eager→TorchScript."
        )
    for row in rows:
        if row["status"]:
            message = str(row["message"]).splitlines()[0]
            console.print(f"job {row['job']} ({row['overrides']}) failed: {message}", markup=False)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.startswith(("accuracy", "agreement")):
        return f"{value:.2%}"
    if name.startswith("size_bytes"):
        return f"{value / 1e6:.1f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
