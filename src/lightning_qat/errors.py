"""The one exception that means: the user can put this right. And the checks that most need it."""

import math
from typing import Any


class UserError(ValueError):
    """A user's mistake or a missing input.

    The message says what happened, why, and what to do; the command line prints only it and ends
    with exit status 2.
    """


def checked_int(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """`value` itself.

    Raises:
        UserError: it is no integer, or out of its range.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < lowest or (highest is not None and value > highest):
        limits = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{name}={value!r} is not permitted: set it to an integer {limits}.")
    return value


def checked_float(name: str, value: Any, lowest: float, highest: float | None = None) -> float:
    """`value` itself.

    Raises:
        UserError: it is no finite number, or out of its range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # not `value < lowest`: a NaN must fail as well
    if not is_number or not lowest <= value < math.inf or (highest is not None and value > highest):
        limits = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{name}={value!r} is not permitted: set it to a number {limits}.")
    return float(value)


def checked_bool(name: str, value: Any) -> bool:
    """`value` itself.

    Raises:
        UserError: it is neither True nor False. A string, which would count as true, is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is not permitted: set it to true or false.")
    return value


def checked_path(name: str, value: Any) -> str:
    """`value` as a string.

    Raises:
        UserError: it is no path, or an empty one.
    """
    if value == "" or not (isinstance(value, str) or hasattr(value, "__fspath__")):
        raise UserError(f"{name}={value!r} is not permitted: set it to a path.")
    return str(value)
