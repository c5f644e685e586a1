"""Find CIFAR-10 in the user's files, else download it. Always check the digests."""

import logging
import tempfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from lightning_qat.data.cifar10_fetch import SOURCES
from lightning_qat.data.cifar10_files import LOCAL_SOURCES, decode, find_local
from lightning_qat.data.cifar10_records import Records, WrongContentError, check_digests
from lightning_qat.errors import UserError

DOWNLOAD_PREFIX = ".cifar10-download-"
"""Prefix of the download folders. No other folder has it."""

log = logging.getLogger(__name__)


def obtain(root: Path, sha1: Mapping[str, str]) -> dict[str, Records]:
    """Return the six official batches. Leave no file in `root`.

    Raises:
        UserError: the files in `root` are not the official files; or `root` has no files and the
            download failed.
    """
    local = find_local(root)
    if local is None:
        return _fetched(root, sha1)
    path, form = local
    try:
        batches = decode(path, form)
        check_digests(batches, sha1)
    except WrongContentError as error:
        raise UserError(
            f"{path}: {error} Delete it and start again to download it again, or replace it "
            "with an intact copy."
        ) from error
    log.info("CIFAR-10 taken from %s", path)
    return batches


def _fetched(root: Path, sha1: Mapping[str, str]) -> dict[str, Records]:
    reasons = []
    for source, (fetch, form) in SOURCES.items():
        log.info("CIFAR-10 is not in %s: trying %s", root, source)
        try:
            with tempfile.TemporaryDirectory(prefix=DOWNLOAD_PREFIX, dir=root) as folder:
                batches = decode(fetch(Path(folder)), form)
            check_digests(batches, sha1)
            return batches
        except (OSError, HTTPException, WrongContentError) as error:
            reasons.append(f"  {source}: {error}")
    raise UserError(
        f"CIFAR-10 is not in {root} and could not be fetched.\n" + "\n".join(reasons) + "\n"
        f"Put one of {', '.join(LOCAL_SOURCES)} into {root}, or name the folder that holds "
        "it with data.root=... or the environment variable CIFAR10_ROOT. Or use data=digits, "
        "which needs no download."
    )
