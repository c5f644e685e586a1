"""Write files completely or not at all, and remove the leftovers of killed processes."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of unfinished files and folders. Their names begin with a dot."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path. Rename it to ``path`` if the block ends without an error."""
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
    """Remove the unfinished files that killed processes left in ``folder``.

    Remove only the leftovers of the file ``name`` if it is given. The caller holds a lock, so that
    no running process uses these files.
    """
    begins = f".{glob.escape(name)}.[0-9]" if name else "."
    for partial in folder.glob(f"{begins}*{PARTIAL}"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()
