"""End a multirun with sweep.csv, a table, sweep.html, and an exit status."""

import csv
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_qat import cli
from lightning_qat.atomic import atomic_path
from lightning_qat.errors import UserError, checked_float
from lightning_qat.overrides import as_typed

if TYPE_CHECKING:  # --help must not wait for the import of torch
    from lightning_qat.report.sweep_runs import Run

log = logging.getLogger(__name__)

# Title in the printed table -> columns of sweep.csv. Two columns are printed as "FP32→INT8".
COLUMNS = {
    "job": ["job"],
    "stage": ["stage"],
    "qconfig": ["qconfig"],
    "seed": ["seed"],
    "FP32": ["accuracy.fp32"],
    "INT8": ["accuracy.int8"],
    "agree": ["agreement.int8_vs_fake_quant"],
    "MB": ["size_bytes.fp32", "size_bytes.int8"],
    "ms": ["latency_ms.fp32_eager.p50", "latency_ms.int8_torchscript.p50"],
}

BUDGET = ("megabytes", "milliseconds")


class SweepReport(Callback):
    """Read the results of the jobs of any launcher, and report them."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse an invalid budget. Hydra calls this before the first job, so no hours are lost."""
        _check_budget(config)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse an invalid budget, although a single run does not use it."""
        _check_budget(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report, and end with the worst status of the jobs."""
        from lightning_qat.report.sweep_runs import read_runs

        folder = Path(config.hydra.sweep.dir)
        try:
            runs = read_runs(folder)
            if runs:
                made = _report(runs, folder, config)
                status = cli.worst([made, *(run.status for run in runs)])
            else:
                status = cli.USERS_MISTAKE
                log.error(
                    "%s holds no job, so there is nothing to report: either the sweep was empty, "
                    "or hydra.output_subdir is not .hydra. Give at least one value to sweep over, "
                    "and leave hydra.output_subdir as it is.",
                    folder,
                )
        except Exception as error:  # Hydra would turn it into a warning, with status 0
            if message := cli.users_mistake(error):
                log.error("the report of the sweep could not be made: %s", message)
                status = cli.USERS_MISTAKE
            else:
                log.exception("the report of the sweep could not be made")
                status = cli.OUR_FAULT
        cli.end(status)


def _check_budget(config: DictConfig) -> None:
    try:
        if not isinstance(config.budget, DictConfig) or set(config.budget) != set(BUDGET):
            raise UserError(
                f"budget={config.budget} is not permitted: set budget.megabytes or "
                "budget.milliseconds."
            )
        for name in BUDGET:
            if config.budget[name] is not None:
                checked_float(f"budget.{name}", config.budget[name], lowest=1e-6)
    except UserError as error:
        log.error("%s", error)
        cli.end(cli.USERS_MISTAKE)


def _report(runs: "list[Run]", folder: Path, config: DictConfig) -> int:
    """Print and write the report; return the exit status of the report alone."""
    status = cli.DONE
    rows = [run.row() for run in runs]
    _write_csv(rows, folder / "sweep.csv")
    _print(rows)

    from lightning_qat.report.sweep_choice import Budget, candidates
    from lightning_qat.report.sweep_configurations import configurations
    from lightning_qat.report.sweep_latency import measure
    from lightning_qat.report.sweep_page import FILE_NAME, write_sweep_page
    from lightning_qat.targets import named_by

    found = configurations(runs)
    try:
        measure(candidates(found)[0], named_by(config))
    except UserError as error:
        log.error("the latencies were not measured: %s", error)
        status = cli.USERS_MISTAKE
    except Exception:  # the results of hours of training are worth a report without latencies
        log.exception("the latencies could not be measured: the report does not show them")
        status = cli.OUR_FAULT
    answer = Budget(**config.budget).answer(found)
    write_sweep_page(folder, runs, found, _command(config), answer)
    console = Console()
    if answer:
        console.print(answer[0].upper() + answer[1:], markup=False, highlight=False)
    console.print(f"The whole sweep: {folder / FILE_NAME}", markup=False, soft_wrap=True)
    return status


def _command(config: DictConfig) -> str:
    """Return the command that started the multirun."""
    task, of_hydra = (as_typed(config.hydra.overrides[x]) for x in ("task", "hydra"))
    of_hydra = [x for x in of_hydra if not x.startswith("hydra.mode=")]  # -m stands for it
    return shlex.join(["python", "train.py", "-m", *task, *of_hydra])


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    first = [name for names in COLUMNS.values() for name in names]
    others = sorted({name for row in rows for name in row} - set(first))
    with atomic_path(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*first, *others])
        writer.writeheader()
        writer.writerows(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    done = [row for row in rows if not row["status"]]
    console = Console()
    if done:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)  # 80 columns
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
    for row, arguments in zip(rows, _own_arguments(rows), strict=True):
        if row["status"]:
            message = str(row["message"]).splitlines()[0]
            console.print(f"job {row['job']} ({row['overrides']}) failed: {message}", markup=False)
        elif arguments:
            console.print(f"job {row['job']}: {arguments}", markup=False, highlight=False)


def _own_arguments(rows: list[dict[str, Any]]) -> list[str]:
    """Return the arguments in which the jobs differ and that no column of the table shows."""
    words = [row["overrides"].split() for row in rows]
    common = set.intersection(*map(set, words))
    shown = ("stage=", "qconfig=", "seed=")
    return [
        " ".join(x for x in own if x not in common and not x.startswith(shown)) for own in words
    ]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.startswith(("accuracy", "agreement")):
        return f"{value:.2%}"
    if name.startswith("size_bytes"):
        return f"{value / 1e6:.1f}"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return str(value)
