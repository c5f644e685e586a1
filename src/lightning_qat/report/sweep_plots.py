"""The plots of sweep.html."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from lightning_qat.report.drawing import COLOURS, CUT, named_rows, note, panel, style, svg
from lightning_qat.report.sweep_configurations import Estimate

MOST_LAYERS = 30  # in a plot: the worst layers
_LETTERS = 28  # of a label
_HEIGHT = 3.1  # smallest height of a scatter plot, in inches
_LINE = 0.17  # inches from one label to the next
_FRAME = 0.55  # inches of a scatter plot below its axes


@dataclass(frozen=True)
class Point:
    """A configuration in a plot.

    Attributes:
        x: its cost.
        accuracy: 0..1, with its interval.
        on_front: no other configuration beats it in size and latency together.
        best_here: no other configuration in this plot beats it.
    """

    x: float
    accuracy: Estimate
    label: str
    on_front: bool
    best_here: bool


def accuracy_against(
    cost: str, points: Sequence[Point], fp32: tuple[float, float] | None
) -> Markup:
    """Draw the test accuracy over the cost. Mark and label the configurations on the front.

    The axes show the front, and the other configurations that are not far below it.

    Args:
        cost: label of the x axis.
        points: the configurations.
        fp32: cost and accuracy of the network in FP32, for comparison.
    """
    lowest = lowest_shown(points)
    shown = [point for point in points if point.accuracy.value >= lowest]
    labels = [(x.x, 100 * x.accuracy.value, x.label) for x in shown if x.on_front]
    height = max(_HEIGHT, _FRAME + _LINE * (len(labels) + 1))
    with style():
        figure, axes = panel(height)
        best = sorted((point for point in shown if point.best_here), key=lambda point: point.x)
        line = [100 * point.accuracy.value for point in best]
        axes.plot([x.x for x in best], line, ":", color=COLOURS["int8"], linewidth=0.8)
        for point in sorted(shown, key=lambda point: point.on_front):  # draw the front on top
            colour = COLOURS["int8" if point.on_front else "fp32"]
            if point.accuracy.ends is not None:
                ends = [100 * end for end in point.accuracy.ends]
                axes.plot([point.x] * 2, ends, color=colour, linewidth=0.8, alpha=0.6)
            size = 6 if point.on_front else 4
            axes.plot(point.x, 100 * point.accuracy.value, "o", color=colour, markersize=size)
        if fp32:
            place = fp32[0], 100 * fp32[1]
            axes.plot(*place, "D", color=COLOURS["fp32"], markersize=6)
            axes.annotate(
                "FP32", place, (0, 6), textcoords="offset points", ha="center",
                va="bottom", fontsize=8, color=COLOURS["muted"],
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_xlabel(cost)
        axes.set_ylabel("test accuracy, %")
        _label(axes, labels, height - _FRAME)
        return svg(figure, f"Test accuracy against {cost}")


def lowest_shown(points: Sequence[Point]) -> float:
    """Return the lowest accuracy to show, 0..1. Lower points would squeeze the others together."""
    front = [point.accuracy.value for point in points if point.on_front]
    return min(front) - max(0.02, max(front) - min(front))


def layers(names: Sequence[str], costs: Sequence[float], unit: str) -> Markup:
    """Draw one bar per layer: the cost of quantizing only this layer."""
    with style():
        figure, axes = named_rows([_cut(name) for name in names])
        for row, cost in enumerate(costs):
            axes.barh(row, cost, height=0.62, color=COLOURS["int8"])
            note(axes, max(cost, 0), row, f"{cost:.2g}")
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
        return svg(figure, "Cost of each layer, worst first")


def drops(names: Sequence[str], gaps: Sequence[Estimate], where: str) -> Markup:
    """Draw a dot and an interval per layer: the accuracy lost by quantizing only this layer."""
    with style():
        figure, axes = named_rows([_cut(name) for name in names])
        for row, gap in enumerate(gaps):
            if gap.ends is not None:
                ends = [-100 * end for end in gap.ends]
                axes.plot(ends, [row, row], color=COLOURS["int8"], linewidth=2, alpha=0.5)
            axes.plot(-100 * gap.value, row, "o", color=COLOURS["int8"], markersize=5)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"points of {where} accuracy lost")
        return svg(figure, f"Loss of {where} accuracy by each layer")


def _label(axes: Axes, labels: Sequence[tuple[float, float, str]], height: float) -> None:
    """Write names in a column right of the axes, without overlap, each joined to its point.

    Args:
        labels: x, y and text of each label.
        height: height of the axes, in inches.
    """
    labels = sorted(labels, key=lambda label: (-label[1], -label[0]))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    apart = (high - low) * _LINE / height
    heights: list[float] = []
    for _, y, _ in labels:
        heights.append(min(y, heights[-1] - apart if heights else high))
    lowest = low
    for index in reversed(range(len(labels))):
        heights[index] = max(heights[index], lowest)
        lowest = heights[index] + apart
    for (x, y, text), place in zip(labels, heights, strict=True):
        axes.annotate(
            _cut(text),
            (x, y),
            (1.06, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS["muted"],
                "linewidth": 0.4,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _cut(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}{CUT}"
