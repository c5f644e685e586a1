"""The table at the end of a run."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_qat.report.intervals import wilson
from lightning_qat.report.titles import NETWORKS, fastest, network, slower_in_int8, title


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print accuracy, agreement, size and latency of every network and runtime of a run."""
    qconfig = f", {metrics['qconfig']}" if metrics["qconfig"] else ""
    table = Table(
        title=f"{metrics['stage']}: {metrics['model']} on {metrics['data']}"
        f" (seed {metrics['seed']}, epochs {metrics['epochs']}{qconfig})",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # this and the next to fit into 80 columns
        show_edge=False,
    )
    for heading in ("", "test accuracy", "agrees", "size", "ms"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    said: set[str] = set()
    for runtime, latency in metrics["latency_ms"].items():
        name = network(runtime)
        figures = ["", "", ""]
        if name not in said and not runtime.startswith("int8_eager"):  # the file was tested
            figures = _figures(metrics, name)
            said.add(name)
        milliseconds = f"{latency['p50']:.2f} ({latency['p95']:.2f})"
        table.add_row(title(runtime), *figures, milliseconds)
    for name in [name for name in metrics["accuracy"] if name not in said]:
        table.add_row(NETWORKS[name], *_figures(metrics, name), "")
    console = Console()
    console.print(table)
    console.print(
        "accuracy (95 % interval). ms: median (p95) of one image on one thread."
        + "\nagrees: images that get the same class as from the network that was validated."
        * ("agreement" in metrics)
    )
    latency_ms = metrics["latency_ms"]
    best, best_fp32 = fastest(latency_ms, "int8"), fastest(latency_ms, "fp32")
    if best and best_fp32:
        speed = latency_ms[best]["p50"]
        console.print(
            f"Fastest here: {title(best)}, {latency_ms['fp32_eager']['p50'] / speed:.1f}x FP32 "
            f"eager, {latency_ms[best_fp32]['p50'] / speed:.1f}x {title(best_fp32)}."
        )
    for sentence in slower_in_int8(latency_ms):
        console.print(sentence)


def _figures(metrics: dict[str, Any], name: str) -> list[str]:
    accuracy = metrics["accuracy"][name]
    low, high = wilson(accuracy, metrics["test_images"])
    agreement = metrics.get("agreement", {}).get(f"{name}_vs_fake_quant")
    size = metrics["size_bytes"].get(name)
    return [
        f"{accuracy:.2%} ({100 * low:.3g}-{100 * high:.3g})",
        "" if agreement is None else f"{agreement:.2%}",
        f"{size / 1e6:.1f} MB" if size else "",
    ]
