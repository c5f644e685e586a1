"""The plots of report.html."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_qat.report import titles
from lightning_qat.report.beside import Curve
from lightning_qat.report.drawing import COLOURS, CUT, WIDTH, named_rows, note, panel, style, svg

_MARKERS = {
    "eager": "o",
    "channels_last": "s",
    "torchscript": "D",
    "onnx": "^",
    "openvino": "v",
    "cuda": "P",
}
_LINES = ("ptq", "int8", "fake-quant")  # colors of curves; no plot has more than three
MOST_LAYERS = 30  # in the plot: the worst layers
MOST_CLASSES = 30  # in the matrix


def accuracy(
    names: Sequence[str], colours: Sequence[str], shares: Sequence[tuple[float, float, float]]
) -> Markup:
    """Draw a dot and an interval for each network.

    Args:
        names: names of the networks.
        colours: CSS variables of the page, without the dashes.
        shares: accuracy, lower and upper end of its interval, 0..1.
    """
    with style():
        figure, axes = named_rows(names)
        for row, (colour, ends) in enumerate(zip(colours, shares, strict=True)):
            share, low, high = (100 * end for end in ends)
            axes.plot([low, high], [row, row], color=COLOURS[colour], linewidth=2, alpha=0.5)
            axes.plot(share, row, "o", color=COLOURS[colour], markersize=6)
        axes.axvline(100 * shares[0][0], color=COLOURS["muted"], linewidth=0.8, linestyle=":")
        axes.set_xlabel("test accuracy, %")
        return svg(figure, "Test accuracy of each network with its 95 % interval")


def accuracy_latency(
    latency_ms: dict[str, Any], shares: dict[str, tuple[float, float, float]]
) -> Markup:
    """Draw one point per runtime.

    Args:
        latency_ms: as in metrics.json.
        shares: accuracy and the ends of its interval, 0..1, by network.
    """
    with style():
        figure, axes = panel(2.9)
        for key, x in latency_ms.items():
            share, low, high = (100 * end for end in shares[titles.network(key)])
            colour = COLOURS[titles.precision(key)]
            axes.plot([x["p50"]] * 2, [low, high], color=colour, linewidth=0.8, alpha=0.5)
            marker = _MARKERS.get(key.partition("_")[2], "*")
            label = titles.title(key)
            axes.plot(
                x["p50"], share, marker, color=colour, markersize=7, markeredgewidth=0, label=label
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("ms for 1 image on 1 thread, median")
        axes.set_ylabel("test accuracy, %")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, handletextpad=0.2)
        return svg(figure, "Test accuracy against latency of each runtime")


def curves(title: str, lines: dict[str, Curve]) -> Markup:
    """Draw lines over the steps of the optimizer, by their logged names."""
    with style():
        figure, axes = panel(2.1)
        for (name, (steps, values)), colour in zip(lines.items(), _LINES, strict=False):
            marker = "o" if len(steps) < 40 else None
            axes.plot(steps, values, color=COLOURS[colour], marker=marker, markersize=3, label=name)
        axes.set_xlabel("optimizer step")
        if len(lines) > 1:
            axes.legend(fontsize=8)
        return svg(figure, f"Training curve: {title}")


def latency(latency_ms: dict[str, Any]) -> Markup:
    """Draw a bar for the median and a tick for the 95th percentile of each runtime."""
    with style():
        figure, axes = named_rows([titles.title(key) for key in latency_ms])
        for row, (key, x) in enumerate(latency_ms.items()):
            axes.barh(row, x["p50"], height=0.62, color=COLOURS[titles.precision(key)])
            axes.plot([x["p95"]] * 2, [row - 0.31, row + 0.31], color=COLOURS["ink"], linewidth=1)
            note(axes, max(x["p95"], x["p50"]), row, f"{x['p50']:.2f}")
        axes.set_xlabel("ms for 1 image on 1 thread")
        axes.margins(x=0.15)
        return svg(figure, "Latency of each runtime, median and 95th percentile")


def sizes(files: Sequence[tuple[str, str, int]]) -> Markup:
    """Draw one bar per file.

    Args:
        files: name, color (a CSS variable of the page) and bytes of each file.
    """
    with style():
        figure, axes = named_rows([name for name, _, _ in files])
        for row, (_, colour, count) in enumerate(files):
            axes.barh(row, count / 1e6, height=0.62, color=COLOURS[colour])
            note(axes, count / 1e6, row, f"{count / 1e6:.1f}")
        axes.set_xlabel("MB (1,000,000 bytes)")
        axes.margins(x=0.15)
        return svg(figure, "Size of each file")


def layers(worst: Sequence[dict[str, Any]]) -> Markup:
    """Draw two SQNRs per layer: with the whole network quantized, and with only this layer."""
    worst = worst[:MOST_LAYERS]
    with style():
        names = [layer["name"] for layer in worst]
        figure, axes = named_rows([x if len(x) < 28 else f"{CUT}{x[-26:]}" for x in names])
        for row, layer in enumerate(worst):
            ends = [layer["sqnr_db"], layer["own_sqnr_db"]]
            if None not in ends:
                axes.plot(ends, [row, row], color=COLOURS["line"], linewidth=2, zorder=1)
        for key, colour, label in (
            ("own_sqnr_db", "ptq", "only this layer quantized"),
            ("sqnr_db", "int8", "whole network quantized"),
        ):
            values = [math.nan if layer[key] is None else layer[key] for layer in worst]
            rows = range(len(worst))
            axes.plot(values, rows, "o", color=COLOURS[colour], markersize=5, label=label)
        axes.set_xlabel("SQNR, dB (right is better)")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, handletextpad=0.2)
        return svg(figure, "Signal-to-quantization-noise ratio of each layer, worst first")


def confusion(matrix: Tensor, class_names: Sequence[str]) -> Markup:
    """Draw the confusion matrix: the shade shows the share of the row, the number the images.

    Args:
        matrix: int64 classes x classes, images by label (row) and prediction (column).
        class_names: at most ``MOST_CLASSES`` names.
    """
    classes = len(class_names)
    names = [name if len(name) < 15 else f"{name[:13]}{CUT}" for name in class_names]
    with style():
        figure, axes = panel(WIDTH)
        shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        for label, predicted in matrix.nonzero().tolist():
            share = float(shares[label, predicted])
            colour = COLOURS["int8" if label == predicted else "bad"]
            corner = (predicted - 0.5, label - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, color=colour, alpha=0.12 + 0.6 * share, lw=0))
            axes.text(
                predicted,
                label,
                str(int(matrix[label, predicted])),
                ha="center",
                va="center",
                fontsize=min(8.0, 110 / classes),
            )
        ticks = range(classes)
        size = min(8.0, 150 / classes)
        upright = all(len(name) < 3 for name in names)
        axes.set_xticks(
            ticks, names, rotation=0 if upright else 90, fontsize=size, color=COLOURS["ink"]
        )
        axes.set_yticks(ticks, names, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlim(-0.5, classes - 0.5)
        axes.set_ylim(classes - 0.5, -0.5)
        axes.set_xlabel("prediction", fontsize=size)
        axes.set_ylabel("label", fontsize=size)
        axes.grid(visible=False)
        axes.set_aspect("equal")
        return svg(figure, "Confusion matrix: images by label and prediction")
