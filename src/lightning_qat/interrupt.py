"""End the command at once on Ctrl-C and SIGTERM, and print how to continue it."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning_qat.overrides import quoted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: int | None = None
_command: str | None = None
_jobs_run_on = False


@contextmanager
def handled() -> Iterator[None]:
    """Raise KeyboardInterrupt on both signals while the block runs.

    Lightning turns it into ``SystemExit(1)`` after its own cleanup.
    """
    global _received, _command
    _received = _command = None
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    raise KeyboardInterrupt


def was_received() -> bool:
    """Return True if a signal has interrupted the command."""
    return _received is not None


def resumable_with(argument: str, folder: str, launcher: str) -> None:
    """Remember the command that continues this one. ``argument`` names its folder."""
    global _command, _jobs_run_on
    _jobs_run_on = "submitit" in launcher  # such jobs may not receive the signals of the terminal
    ours = (f"{argument}=", "resume=")
    given = [x for x in sys.argv[1:] if not x.lstrip("+").startswith(ours)]
    # argparse requires all overrides in one place, so the new ones follow the last override.
    last = max((i for i, x in enumerate(given, 1) if "=" in x and x[0] != "-"), default=len(given))
    here = f"{argument}={quoted(folder)}"
    words = [*given[:last], here, "resume=true", *given[last:]]
    _command = shlex.join(["python", sys.argv[0], *words])


def tell() -> int:
    """Print how to continue the command, and return the exit status."""
    assert _received is not None
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # nothing is left to interrupt
    if _command:
        name = "Ctrl-C" if _received == signal.SIGINT else signal.Signals(_received).name
        jobs = " Jobs that submitit started may continue to run: wait for them, or end them."
        print(
            f"\nInterrupted by {name}.{jobs * _jobs_run_on} This continues it:\n{_command}",
            file=sys.stderr,
        )
    return 128 + _received
