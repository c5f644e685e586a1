"""Pages from templates: how numbers are written in all of them, and that they are whole."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_qat.atomic import atomic_path
from lightning_qat.report import titles

_ENVIRONMENT = {"cpu": "CPU", "gpu": "GPU", "vnni": "VNNI", "isa": "kernels", "python": "Python"}


def write_page(path: Path, template: str, **facts: Any) -> None:
    """Write what ``template``, of this package, makes of the facts, or leave what was there."""
    environment = Environment(
        loader=PackageLoader("lightning_qat", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"name_of": titles.title, "names": _ENVIRONMENT}
    environment.filters |= {"percent": percent, "points": points}
    environment.filters |= {"short": _short, "decibels": _decibels}
    page = environment.get_template(template).render(facts)
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def percent(share: float, digits: int = 2) -> str:
    """With the space that the sign of per cent takes."""
    return f"{share:.{digits}%}".replace("%", "\N{NO-BREAK SPACE}%")


def points(share: float) -> str:
    """Percentage points with their sign."""
    points = round(100 * share, 2)
    return f"{points:+.2f}".replace("-", "\N{MINUS SIGN}") if points else "0.00"


def _decibels(ratio: float | None) -> str:
    return "none" if ratio is None else f"{ratio:.1f}"


def _short(number: float) -> str:
    """Three digits."""
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")
