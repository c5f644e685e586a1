"""The table at the end of a run."""

from typing import Any

from rich.console import Console
from rich.table import Table

_TITLES = {"fp32": "FP32", "fake_quant": "fake-quant", "int8": "INT8"}


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print accuracy, size and latency of every network of a run."""
    qconfig = f", {metrics['qconfig']}" if metrics["qconfig"] else ""
    table = Table(
        title=f"{metrics['stage']}: {metrics['model']} on {metrics['data']}"
        f" (seed {metrics['seed']}, epochs {metrics['epochs']}{qconfig})"
    )
    for title in ("", "test accuracy", "size", "eager ms", "TorchScript ms"):
        table.add_column(title, justify="right" if title else "left")
    for name, accuracy in metrics["accuracy"].items():
        size = metrics["size_bytes"].get(name)
        table.add_row(
            _TITLES[name],
            f"{accuracy:.2%} ± {1.96 * sigma(accuracy, metrics['test_images']):.2%}",
            f"{size / 1e6:.1f} MB" if size else "",
            _milliseconds(metrics, f"{name}_eager"),
            _milliseconds(metrics, f"{name}_torchscript"),
        )
    console = Console()
    console.print(table)
    if "agreement" in metrics:
        console.print(
            f"INT8 and fake-quant agree on {metrics['agreement']['int8_vs_fake_quant']:.2%} of the "
            f"{metrics['test_images']} test images."
        )
    console.print("±: 95 % binomial interval. ms: median (p95) of one image on one thread.")


def sigma(accuracy: float, images: int) -> float:
    """One binomial standard deviation of an accuracy measured on so many images."""
    return (accuracy * (1 - accuracy) / images) ** 0.5


def _milliseconds(metrics: dict[str, Any], runtime: str) -> str:
    if runtime not in metrics["latency_ms"]:
        return ""
    latency = metrics["latency_ms"][runtime]
    return f"{latency['p50']:.2f} ({latency['p95']:.2f})"
