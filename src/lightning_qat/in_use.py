"""Let one process at a time use a folder. A lock ends when its process ends or is killed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from lightning_qat.atomic import remove_partials
from lightning_qat.errors import UserError

_LOCK_FILE = ".lock"
_PATIENCE = 1  # seconds: a process that checks a folder holds its lock for a moment
_ROOM = 1 << 16  # bytes: space for the files that Hydra writes before a job begins


@contextmanager
def exclusive(lock_file: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of this file. Never delete the file, because a waiting process has it open.

    Raises:
        filelock.Timeout: another process has held the lock for ``timeout`` seconds. -1 waits for
            ever.
    """
    from filelock import FileLock  # a late import, because --help does not need it

    with FileLock(lock_file).acquire(timeout=timeout):
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs and sweeps, and delete the leftovers of killed runs.

    Raises:
        UserError: another run or sweep is using the folder.
        OSError: the folder cannot be written.
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
    """Return True if a run or sweep is using the folder."""
    from filelock import Timeout

    if not (folder / _LOCK_FILE).exists():
        return False
    try:
        with exclusive(folder / _LOCK_FILE, 0):
            return False
    except Timeout:
        return True
    except OSError:  # a read-only folder: no process writes there
        return False


def refusal(folder: Path) -> str:
    """Return the message for the second process that asks for the folder."""
    return (
        f"another process is at work in {folder}, and this process would disturb it: wait for it, "
        "or name another folder with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for a sweep)."
    )
