"""Read the results of the jobs of a multirun from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_qat import cli
from lightning_qat.overrides import as_typed
from lightning_qat.report.metrics import FILE_NAME


@dataclass(frozen=True)
class Run:
    """One job.

    Attributes:
        job: its number in the multirun.
        overrides: its arguments.
        metrics: the content of its metrics.json; empty if it failed.
        status: as in ``cli``.
        message: the reason of a failure.
    """

    folder: Path
    job: int
    overrides: tuple[str, ...]
    metrics: dict[str, Any]
    status: int
    message: str | None = None

    def row(self) -> dict[str, Any]:
        """Return its row of sweep.csv: the metrics by dotted name, or the failure."""
        row = {"job": self.job, "overrides": " ".join(self.overrides)}
        if self.status:
            return row | {"status": self.status, "message": self.message}
        return row | _flatten(self.metrics)


def read_runs(folder: Path) -> list[Run]:
    """Return every job below the folder of a multirun, for any launcher, sorted by number."""
    jobs = (path.parent.parent for path in folder.glob("*/.hydra/hydra.yaml"))
    return sorted((_read(job) for job in jobs), key=lambda run: run.job)


def _read(folder: Path) -> Run:
    number = int(OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.job.num)
    typed: Any = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    overrides = tuple(as_typed(typed))
    try:
        failure = json.loads((folder / cli.FAILURE_FILE).read_text())
        return Run(folder, number, overrides, {}, failure["status"], failure["message"])
    except FileNotFoundError:
        pass
    try:
        metrics = json.loads((folder / FILE_NAME).read_text())
    except FileNotFoundError:
        message = f"the job wrote neither {FILE_NAME} nor a message: it was killed, or never began"
        return Run(folder, number, overrides, {}, cli.OUR_FAULT, message)
    return Run(folder, number, overrides, metrics, metrics["status"])


def _flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
