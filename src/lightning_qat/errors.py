"""Define the exception for mistakes that the user can correct, and checks of single values."""

import math
from typing import Any


class UserError(ValueError):
    """A user's mistake or a missing input.

    The message says what happened, why, and what to do. The command line prints only the message
    and ends with exit status 2.
    """


def checked_int(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """Return `value` if it is an integer in the range.

    Raises:
        UserError: `value` is no integer, or it is out of its range.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < lowest or (highest is not None and value > highest):
        limits = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{name}={value!r} is not permitted: set it to an integer {limits}.")
    return value


def checked_float(name: str, value: Any, lowest: float, highest: float | None = None) -> float:
    """Return `value` as a float if it is a number in the range.

    Raises:
        UserError: `value` is no finite number, or it is out of its range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not `value < lowest`, because NaN must fail as well.
    if not is_number or not lowest <= value < math.inf or (highest is not None and value > highest):
        limits = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{name}={value!r} is not permitted: set it to a number {limits}.")
    return float(value)


def checked_bool(name: str, value: Any) -> bool:
    """Return `value` if it is True or False.

    Raises:
        UserError: `value` has another type. A string is an error, because it would count as true.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is not permitted: set it to true or false.")
    return value


def checked_path(name: str, value: Any) -> str:
    """Return the path `value` as a string.

    Raises:
        UserError: `value` is no path, or it is empty.
    """
    if value == "" or not (isinstance(value, str) or hasattr(value, "__fspath__")):
        raise UserError(f"{name}={value!r} is not permitted: set it to a path.")
    return str(value)
