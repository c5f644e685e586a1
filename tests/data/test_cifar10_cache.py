"""The decoded cache is made once and completely, and made again if it is damaged."""

import logging
import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from lightning_qat.data import CIFAR10DataModule
from lightning_qat.data.cifar10_cache import build_cache, read_cache
from lightning_qat.errors import UserError

Publish = Callable[[str, Path], None]


def test_the_cache_alone_is_enough(root: Path, publish: Publish, sha1: dict[str, str]) -> None:
    publish("binary archive", root)
    build_cache(root, sha1)
    (root / "cifar-10-binary.tar.gz").unlink()
    datamodule = CIFAR10DataModule(root, sha1=sha1, val_size=10)
    datamodule.prepare_data()
    datamodule.setup("fit")
    assert sum(len(labels) for _, labels, _ in datamodule.train_dataloader()) == 90


def build_together(start: Barrier, root: Path, sha1: dict[str, str]) -> None:
    start.wait(60)
    build_cache(root, sha1)


def test_two_processes_at_once_fetch_once(
    root: Path, sha1: dict[str, str], npm_calls: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    arguments = (spawn.Barrier(2), root, sha1)
    processes = [spawn.Process(target=build_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(npm_calls.read_text().splitlines()) == 1
    assert read_cache(root, sha1) is not None


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "other content"])
def test_a_damaged_cache_is_made_anew(
    damage: str,
    root: Path,
    publish: Publish,
    sha1: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish("binary folder", root)
    build_cache(root, sha1)
    cache = root / "cifar10.npz"
    content = bytearray(cache.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    kept = {"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))
    cache.write_bytes(b"some text" if damage == "other content" else content[:kept])
    with caplog.at_level(logging.WARNING):
        build_cache(root, sha1)
    assert "damaged and will be made again" in caplog.text
    assert read_cache(root, sha1) is not None


def test_a_cache_of_other_images_is_not_taken(
    root: Path, publish: Publish, sha1: dict[str, str]
) -> None:
    publish("binary folder", root)
    build_cache(root, sha1)
    assert read_cache(root, sha1 | {"test_batch": "0" * 40}) is None


def test_a_full_disk_leaves_no_half_file(
    root: Path, publish: Publish, sha1: dict[str, str]
) -> None:
    publish("binary folder", root)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="Free some space"):
            build_cache(root, sha1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {path.name for path in root.iterdir()}
    assert left - {"cifar10.npz.lock"} == {"cifar-10-batches-bin"}


def test_what_a_killed_process_left_is_no_obstacle(
    root: Path, publish: Publish, sha1: dict[str, str]
) -> None:
    publish("binary folder", root)
    (root / "cifar10.npz.lock").touch()
    (root / "cifar10.npz.unfinished").write_bytes(b"half")
    build_cache(root, sha1)
    assert not (root / "cifar10.npz.unfinished").exists()


def test_a_file_as_root_is_refused(tmp_path: Path, sha1: dict[str, str]) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"data\.root"):
            build_cache(root, sha1)


def test_a_folder_in_place_of_the_cache_is_refused(root: Path, sha1: dict[str, str]) -> None:
    (root / "cifar10.npz").mkdir()
    with pytest.raises(UserError, match=r"cifar10\.npz a readable file"):
        build_cache(root, sha1)


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is read-only for the superuser")
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_folder_without_permission_is_refused(
    mode: int, root: Path, publish: Publish, sha1: dict[str, str]
) -> None:
    publish("binary folder", root)
    root.chmod(mode)
    try:
        with pytest.raises(UserError, match=r"data\.root"):
            build_cache(root, sha1)
    finally:
        root.chmod(0o700)


def test_setup_without_a_cache_says_what_to_call(root: Path, sha1: dict[str, str]) -> None:
    with pytest.raises(UserError, match="prepare_data"):
        CIFAR10DataModule(root, sha1=sha1).setup("fit")
