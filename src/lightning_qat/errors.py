"""The one exception that means: the user can put this right. And the checks that most need it."""


class UserError(ValueError):
    """A user's mistake or a missing input.

    The message says what happened, why, and what to do; the command line prints only it and ends
    with exit status 2.
    """


def checked_int(name: str, value: int, lowest: int) -> int:
    """`value` itself.

    Raises:
        UserError: it is no integer, or less than `lowest`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise UserError(f"{name}={value!r} is not permitted: set it to an integer >= {lowest}.")
    return value


def checked_float(name: str, value: float, lowest: float) -> float:
    """`value` itself.

    Raises:
        UserError: it is no number, or less than `lowest`.
    """
    # not `value < lowest`: a NaN must fail as well
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= lowest:
        raise UserError(f"{name}={value!r} is not permitted: set it to a number >= {lowest}.")
    return float(value)
