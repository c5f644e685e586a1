"""The one exception that means: the user can put this right."""


class UserError(ValueError):
    """A user's mistake or a missing input.

    The message says what happened, why, and what to do; the command line prints only it and ends
    with exit status 2.
    """
