"""All bad inputs give status 2 and one message, and change no files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Train

Refused = Callable[..., str]
QUICK = ("data=digits", "trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1")


def state(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return the existing files and their times of writing, without the logs of failed runs."""
    stats = {
        path: path.lstat()
        for path in folder.rglob("*")
        if not path.is_dir() and "runs" not in path.relative_to(folder).parts
    }
    return {path: (x.st_ino, x.st_size, x.st_mtime_ns) for path, x in stats.items()}


@pytest.fixture
def refused(train: Train, tmp_path: Path) -> Refused:
    """Run train.py with arguments that it must refuse; return its printed output."""

    def check(*args: str, words: list[str], unchanged: Path = tmp_path) -> str:
        before = state(unchanged)
        status, printed = train(*args)
        assert status == 2, printed
        assert "Traceback" not in printed
        for word in words:
            assert word in printed.replace("\n", " "), printed
        new = {path for path in state(unchanged) if path not in before}
        assert {path: x for path, x in state(unchanged).items() if path not in new} == before
        assert not [path for path in new if "multiruns" not in path.parts], new
        return printed

    return check
