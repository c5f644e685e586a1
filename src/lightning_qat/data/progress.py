"""The progress bar of downloads and decoding."""

from rich.console import Console
from rich.progress import Progress


def progress_bar() -> Progress:
    """Make a bar on stderr that disappears at the end. Show nothing if stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
