"""Common parts of the plots of all pages: inline SVG in the colors of the page.

The plots follow the light and the dark theme of the page. Text remains text, in the font of the
page. The global state of matplotlib does not change, and the same figures give the same SVG.
"""

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# CSS variable of report.css -> the color that replaces it while matplotlib draws.
COLOURS = {
    name: f"#{number:02x}{number:02x}{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "line", "paper", "fp32", "ptq", "fake-quant", "int8", "bad"), start=1
    )
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "lightning_qat",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may have the name $
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.color": COLOURS["line"],
    "ytick.labelcolor": COLOURS["ink"],
    "ytick.major.size": 0,
}
WIDTH = 4.4  # inches, 317 units: the width of a phone, so that 9-point text is legible there
_ROW = 0.27  # height in inches of one row of a bar chart
CUT = "\N{HORIZONTAL ELLIPSIS}"


def style() -> AbstractContextManager[None]:
    """Return the matplotlib style of all plots, as a context manager."""
    return matplotlib.style.context(_STYLE, after_reset=True)


def panel(height: float) -> tuple[Figure, Axes]:
    """Return a figure with the width of a phone and ``height`` inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def named_rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Return a figure and its axes with one named row each, the first row on top."""
    figure, axes = panel(0.75 + _ROW * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes


def note(axes: Axes, x: float, row: int, text: str) -> None:
    """Write a number after the bar of a row."""
    axes.annotate(text, (x, row), (4, 0), textcoords="offset points", va="center", fontsize=8)


def svg(figure: Figure, label: str) -> Markup:
    """Return the figure as an element of an HTML page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # The browser has the glyphs that are missing in matplotlib's own font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(
            file,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    _, _, width, height = re.search(r'viewBox="([^"]*)"', text)[1].split()  # type: ignore[index]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    text = re.sub(r"<svg.*?>", lambda _: head, text, count=1, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # use the font of the page
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the ids are the same in every plot of a page
    text = re.sub(r"(?<=: )#[0-9a-f]{6}(?=[;\"])", lambda m: _VARIABLES.get(m[0], m[0]), text)
    return Markup(text)  # matplotlib has escaped its texts
