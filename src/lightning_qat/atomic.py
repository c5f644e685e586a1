"""Files that are there whole or not at all, and what a killed process leaves of them."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""How the names of unfinished files and folders end; they begin with a dot."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a name to write to, which becomes ``path`` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(partial)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path, name: str = "") -> None:
    """Remove what killed processes have left unfinished in ``folder``, of one file or of all.

    The caller holds a lock, so that no living process is at work on them.
    """
    begins = f".{glob.escape(name)}.[0-9]" if name else "."
    for partial in folder.glob(f"{begins}*{PARTIAL}"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()
