"""Write pages from templates completely or not at all, and format their numbers."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_qat.atomic import atomic_path
from lightning_qat.report import titles

_ENVIRONMENT = {"cpu": "CPU", "gpu": "GPU", "vnni": "VNNI", "isa": "kernels", "python": "Python"}


def write_page(path: Path, template: str, **facts: Any) -> None:
    """Fill ``template`` with the facts. After an error, the old page is unchanged."""
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
    """Return a share as a percentage, with a space before the percent sign."""
    return f"{share:.{digits}%}".replace("%", "\N{NO-BREAK SPACE}%")


def points(share: float) -> str:
    """Return percentage points with their sign."""
    points = round(100 * share, 2)
    return f"{points:+.2f}".replace("-", "\N{MINUS SIGN}") if points else "0.00"


def _decibels(ratio: float | None) -> str:
    return "none" if ratio is None else f"{ratio:.1f}"


def _short(number: float) -> str:
    """Return a number with three digits."""
    return f"{number:.3g}".replace("-", "\N{MINUS SIGN}")
