"""One process at a time in a folder: locks that end with their process, even where it is killed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from lightning_qat.atomic import remove_partials
from lightning_qat.errors import UserError

_LOCK_FILE = ".lock"
_PATIENCE = 1  # seconds; who looks whether a folder is in use holds its lock for a moment
_ROOM = 1 << 16  # bytes that Hydra writes before a job begins, with a traceback where it cannot


@contextmanager
def exclusive(lock_file: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of this file, which stays: who waits for it would hold a removed one's.

    Raises:
        filelock.Timeout: another process has held it for ``timeout`` seconds; -1 waits for ever.
    """
    from filelock import FileLock  # --help shall not wait for it

    with FileLock(lock_file).acquire(timeout=timeout):
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs and sweeps out of the folder, and clear away what killed ones have left.

    Raises:
        UserError: another one is at work there.
        OSError: nothing can be written there.
    """
    from filelock import Timeout

    lock_file = folder / _LOCK_FILE
    held = exclusive(lock_file, _PATIENCE)
    try:
        held.__enter__()
    except Timeout as error:
        raise UserError(refusal(folder)) from error
    try:
        with TemporaryFile(dir=folder) as room:
            room.write(bytes(_ROOM))
        for place in (folder, folder / "checkpoints"):
            remove_partials(place)
        yield
    finally:
        held.__exit__(None, None, None)


def is_in_use(folder: Path) -> bool:
    """Whether a run or sweep is at work in the folder."""
    from filelock import Timeout

    if not (folder / _LOCK_FILE).exists():
        return False
    try:
        with exclusive(folder / _LOCK_FILE, 0):
            return False
    except Timeout:
        return True
    except OSError:  # read-only: nobody is at work there
        return False


def refusal(folder: Path) -> str:
    """What is said to whoever comes second."""
    return (
        f"another process is at work in {folder}, which this one would get in the way of: wait for "
        "it, or name another folder with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for a sweep)."
    )
