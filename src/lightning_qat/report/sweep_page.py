"""sweep.html: the results of all jobs of a multirun, on one page that needs no other file.

This module collects the facts, and sweep.html.j2 holds the text.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from lightning_qat.report import page as run_page
from lightning_qat.report import sweep_latency, sweep_plots, titles
from lightning_qat.report.environment import environment
from lightning_qat.report.render import write_page
from lightning_qat.report.sweep_choice import (
    LEVEL,
    candidates,
    front,
    megabytes,
    milliseconds,
    score,
)
from lightning_qat.report.sweep_configurations import Configuration, Estimate
from lightning_qat.report.sweep_runs import Run

FILE_NAME = "sweep.html"


def write_sweep_page(
    folder: Path,
    runs: Sequence[Run],
    configurations: Sequence[Configuration],
    command: str,
    budget: str | None,
) -> None:
    """Write ``folder/sweep.html``. After an error, the old file is unchanged.

    Args:
        folder: folder of the multirun.
        runs: all runs of the multirun.
        configurations: the configurations of the finished runs.
        command: the command that started the multirun.
        budget: the sentence of ``Budget.answer``.
    """
    found, why_none = candidates(configurations)
    layers = [x for x in configurations if x.layer is not None and x.network == "int8"]
    whole = [x for x in configurations if x not in layers]
    done = [run for run in runs if not run.status]
    by, by_validation = score(found or whole)
    write_page(
        folder / FILE_NAME,
        "sweep.html.j2",
        runs=runs,
        done=done,
        configurations=sorted(whole, key=by, reverse=True),
        candidates=found,
        why_none=why_none,
        by_validation=by_validation,
        front=_front(found, by) if found else None,
        layers=_sensitivity(layers) if layers else None,
        timed=[x for x in configurations if x.latency],
        timing=sweep_latency,
        level=LEVEL,
        shared=[x for x in runs[0].overrides if all(x in run.overrides for run in runs[1:])]
        * (len(runs) > 1),
        command=command,
        budget=budget,
        # A relative path. Quote it, so that the browser does not split it.
        link=lambda run: quote(f"{run.folder.name}/{run_page.FILE_NAME}"),
        has_page=lambda run: (run.folder / run_page.FILE_NAME).is_file(),
        runtime_of=lambda latency: titles.runtime(f"int8_{latency.runtime}"),
        seeds=sorted({run.metrics["seed"] for run in done}),
        here=environment(),
        environments=_together([run.metrics["environment"] for run in done]),
    )


def _front(found: Sequence[Configuration], by: Callable[[Configuration], float]) -> dict[str, Any]:
    rows = sorted(front(found, by, (megabytes, milliseconds)), key=by, reverse=True)

    def points(
        shown: Sequence[Configuration],
        cost: Callable[[Configuration], float],
        x: Callable[..., float],
    ) -> list[sweep_plots.Point]:
        best = front(shown, by, [cost])
        return [
            sweep_plots.Point(x(one), one.accuracy, _short(one), one in rows, one in best)
            for one in shown
        ]

    fp32 = fmean(x.fp32_accuracy for x in found)
    fp32_megabytes = found[0].runs[0].metrics["size_bytes"]["fp32"] / 1e6
    one_model = len({x.runs[0].metrics["model"] for x in found}) == 1
    packed = all(x.packed_bytes for x in found)
    title = "MB, weights packed at their bits" if packed else "MB"
    of_size = points(found, megabytes, megabytes)
    reference = (fp32_megabytes, fp32) if one_model else None
    plots = [sweep_plots.accuracy_against(title, of_size, reference)]
    if timed := [x for x in found if x.latency]:
        of_latency = points(timed, milliseconds, lambda x: x.latency.to_eager)
        reference = (1.0, fp32) if one_model else None
        title = "latency, FP32 eager = 1"
        plots.insert(0, sweep_plots.accuracy_against(title, of_latency, reference))
    lowest = sweep_plots.lowest_shown(of_size)
    return {
        "rows": rows,
        "plots": plots,
        "below": [x for x in found if x.accuracy.value < lowest],
        "packed": packed,
        "smallest": min(rows, key=megabytes),
        "fastest": min(rows, key=milliseconds),
    }


def _short(configuration: Configuration) -> str:
    """Return its label in a short form for plots."""
    words = []
    for override in configuration.label.split():
        key, _, value = override.partition("=")
        with contextlib.suppress(ValueError):  # a sampler's floats have 17 digits
            value = f"{float(value):.3g}"
        key = key.rpartition(".")[2]
        words.append(value if key in ("stage", "qconfig") else f"{key}={value}")
    return " ".join(words)


def _sensitivity(layers: Sequence[Configuration]) -> dict[str, Any]:
    """Return the cost of each layer, worst first, and the fewest layers with half of the cost."""
    by_divergence = all(x.divergence is not None for x in layers)
    on_validation = all(x.validation_gap is not None for x in layers)

    def gap(layer: Configuration) -> Estimate:
        found = layer.validation_gap if on_validation else layer.gap
        assert found is not None  # it is quantized
        return found

    def cost(layer: Configuration) -> float:
        return (layer.divergence or 0.0) if by_divergence else -100 * gap(layer).value

    rows = sorted(layers, key=cost, reverse=True)
    worst: list[str] = []
    total, sum_ = sum(max(0.0, cost(x)) for x in rows), 0.0
    for row in rows:
        if sum_ >= total / 2:
            break
        sum_ += max(0.0, cost(row))
        worst.append(str(row.layer))
    where = "validation" if on_validation else "test"
    shown = rows[: sweep_plots.MOST_LAYERS]
    names = [_layer_name(row) for row in shown]
    unit = "nats of divergence" if by_divergence else f"points of {where} accuracy lost"
    return {
        "rows": [{"name": _layer_name(x), "cost": cost(x), "gap": gap(x)} for x in rows],
        "shown": len(shown),
        "by_divergence": by_divergence,
        "where": where,
        "unit": unit,
        "worst": list(dict.fromkeys(worst)),
        "plot": sweep_plots.layers(names, [cost(x) for x in shown], unit),
        "drops": sweep_plots.drops(names, [gap(x) for x in shown], where),
    }


def _layer_name(configuration: Configuration) -> str:
    return configuration.label.removeprefix("only=")


def _together(environments: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each key, without duplicates."""
    return {
        key: list(dict.fromkeys(x.get(key) for x in environments))
        for key in (environments[0] if environments else {})
    }
