"""Plots as inline SVG, whose colours are the page's: they follow its light and dark theme.

Text stays text, in the page's font. Nothing of matplotlib's global state is touched, and the same
figures give the same SVG.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_qat.report import titles
from lightning_qat.report.beside import Curve

# CSS variable of report.css -> the colour that stands for it while matplotlib draws.
_COLOURS = {
    name: f"#{number:02x}{number:02x}{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "line", "paper", "fp32", "ptq", "fake-quant", "int8", "bad"), start=1
    )
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "lightning_qat",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.color": _COLOURS["line"],
    "ytick.labelcolor": _COLOURS["ink"],
    "ytick.major.size": 0,
}
_WIDTH = 4.4  # inches, 317 units: as wide as a phone, so that 9-point text stays legible on it
_ROW = 0.27  # inches of one row of a bar chart
_MARKERS = {
    "eager": "o",
    "channels_last": "s",
    "torchscript": "D",
    "onnx": "^",
    "openvino": "v",
    "cuda": "P",
}
_CUT = "\N{HORIZONTAL ELLIPSIS}"
MOST_LAYERS = 30  # in the plot: the worst
MOST_CLASSES = 30  # in the matrix


def accuracy(
    names: Sequence[str], colours: Sequence[str], shares: Sequence[tuple[float, float, float]]
) -> Markup:
    """A dot and an interval each, best read downwards.

    Args:
        names: of the networks.
        colours: CSS variables of the page, without the dashes.
        shares: accuracy, lower and upper end of its interval, 0..1.
    """
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _rows(names)
        for row, (colour, ends) in enumerate(zip(colours, shares, strict=True)):
            share, low, high = (100 * end for end in ends)
            axes.plot([low, high], [row, row], color=_COLOURS[colour], linewidth=2, alpha=0.5)
            axes.plot(share, row, "o", color=_COLOURS[colour], markersize=6)
        axes.axvline(100 * shares[0][0], color=_COLOURS["muted"], linewidth=0.8, linestyle=":")
        axes.set_xlabel("test accuracy, %")
        return _svg(figure, "Test accuracy of each network with its 95 % interval")


def accuracy_latency(
    latency_ms: dict[str, Any], shares: dict[str, tuple[float, float, float]]
) -> Markup:
    """One point a runtime.

    Args:
        latency_ms: as in metrics.json.
        shares: accuracy and the ends of its interval, 0..1, by network.
    """
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _panel(2.9)
        for key, x in latency_ms.items():
            share, low, high = (100 * end for end in shares[titles.network(key)])
            colour = _COLOURS[titles.precision(key)]
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
        return _svg(figure, "Test accuracy against latency of each runtime")


def curves(title: str, lines: dict[str, Curve]) -> Markup:
    """Lines over the optimiser's steps, by the name they were logged under."""
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _panel(2.1)
        for (name, (steps, values)), colour in zip(lines.items(), ("ptq", "int8"), strict=False):
            marker = "o" if len(steps) < 40 else None
            axes.plot(
                steps, values, color=_COLOURS[colour], marker=marker, markersize=3, label=name
            )
        axes.set_xlabel("optimiser step")
        if len(lines) > 1:
            axes.legend(fontsize=8)
        return _svg(figure, f"Training curve: {title}")


def latency(latency_ms: dict[str, Any]) -> Markup:
    """A bar for the median and a tick at the 95th percentile of each runtime."""
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _rows([titles.title(key) for key in latency_ms])
        for row, (key, x) in enumerate(latency_ms.items()):
            axes.barh(row, x["p50"], height=0.62, color=_COLOURS[titles.precision(key)])
            axes.plot([x["p95"]] * 2, [row - 0.31, row + 0.31], color=_COLOURS["ink"], linewidth=1)
            _note(axes, max(x["p95"], x["p50"]), row, f"{x['p50']:.2f}")
        axes.set_xlabel("ms for 1 image on 1 thread")
        axes.margins(x=0.15)
        return _svg(figure, "Latency of each runtime, median and 95th percentile")


def sizes(files: Sequence[tuple[str, str, int]]) -> Markup:
    """A bar a file.

    Args:
        files: name, colour (a CSS variable of the page) and bytes of each.
    """
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _rows([name for name, _, _ in files])
        for row, (_, colour, count) in enumerate(files):
            axes.barh(row, count / 1e6, height=0.62, color=_COLOURS[colour])
            _note(axes, count / 1e6, row, f"{count / 1e6:.1f}")
        axes.set_xlabel("MB (1,000,000 bytes)")
        axes.margins(x=0.15)
        return _svg(figure, "Size of each file")


def layers(worst: Sequence[dict[str, Any]]) -> Markup:
    """Two SQNRs a layer: everything up to it quantised, and only it."""
    worst = worst[:MOST_LAYERS]
    with matplotlib.style.context(_STYLE, after_reset=True):
        names = [layer["name"] for layer in worst]
        figure, axes = _rows([x if len(x) < 28 else f"{_CUT}{x[-26:]}" for x in names])
        for row, layer in enumerate(worst):
            ends = [layer["sqnr_db"], layer["own_sqnr_db"]]
            if all(math.isfinite(end) for end in ends):
                axes.plot(ends, [row, row], color=_COLOURS["line"], linewidth=2, zorder=1)
        for key, colour, label in (
            ("own_sqnr_db", "ptq", "only this layer quantised"),
            ("sqnr_db", "int8", "whole network quantised"),
        ):
            values = [layer[key] if math.isfinite(layer[key]) else math.nan for layer in worst]
            rows = range(len(worst))
            axes.plot(values, rows, "o", color=_COLOURS[colour], markersize=5, label=label)
        axes.set_xlabel("SQNR, dB (right is better)")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, handletextpad=0.2)
        return _svg(figure, "Signal-to-quantisation-noise ratio of each layer, worst first")


def confusion(matrix: Tensor, class_names: Sequence[str]) -> Markup:
    """The confusion matrix: shade for the share of the row, number for the images.

    Args:
        matrix: int64 classes x classes, images by label (row) and prediction (column).
        class_names: no more than ``MOST_CLASSES``.
    """
    classes = len(class_names)
    names = [name if len(name) < 15 else f"{name[:13]}{_CUT}" for name in class_names]
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _panel(_WIDTH)
        shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        for label, predicted in matrix.nonzero().tolist():
            share = float(shares[label, predicted])
            colour = _COLOURS["int8" if label == predicted else "bad"]
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
            ticks, names, rotation=0 if upright else 90, fontsize=size, color=_COLOURS["ink"]
        )
        axes.set_yticks(ticks, names, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlim(-0.5, classes - 0.5)
        axes.set_ylim(classes - 0.5, -0.5)
        axes.set_xlabel("prediction", fontsize=size)
        axes.set_ylabel("label", fontsize=size)
        axes.grid(visible=False)
        axes.set_aspect("equal")
        return _svg(figure, "Confusion matrix: images by label and prediction")


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes with one named row each, the first on top."""
    figure, axes = _panel(0.75 + _ROW * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _note(axes: Axes, x: float, row: int, text: str) -> None:
    axes.annotate(text, (x, row), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element of an HTML page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # the browser has the glyphs that matplotlib's own font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(
            file,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    _, _, width, height = re.search(r'viewBox="([^"]*)"', svg)[1].split()  # type: ignore[index]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    svg = re.sub(r"<svg.*?>", lambda _: head, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every plot of a page
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}(?=[;\"])", lambda m: _VARIABLES.get(m[0], m[0]), svg)
    return Markup(svg)  # matplotlib has escaped its texts
