"""Check the classes and functions that a configuration file of a run names.

Hydra calls every ``_target_`` of a configuration. The user wrote the command line, but anybody may
have written a file in the folder of a run. So such a file may name only the targets that conf/ or
the command names.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_qat.errors import UserError
from lightning_qat.overrides import as_typed

_TARGET = re.compile(r"_target_['\"]?\s*[:=]\s*['\"]?([\w.]+)")
_NETWORK = "lightning_qat.network.resnet18"


def named_in(folder: Path) -> set[str]:
    """Return every ``_target_`` of the configuration files below ``folder``."""
    return {name for file in folder.rglob("*.yaml") for name in _TARGET.findall(file.read_text())}


def named_by(config: DictConfig) -> set[str]:
    """Return every ``_target_`` that a command and its configuration files name."""
    names = {_NETWORK}
    for source in OmegaConf.select(config, "hydra.runtime.config_sources") or ():
        if source.provider in ("main", "command-line"):
            names |= named_in(Path(source.path))
    for override in as_typed(config.hydra.overrides.task):
        names |= set(_TARGET.findall(override))
    return names


def checked(config: Any, known: Collection[str], file: Path) -> DictConfig:
    """Return a copy of ``config`` without interpolations, which is safe to instantiate.

    Args:
        config: a part of the content of ``file``.
        known: the names that are allowed as ``_target_``.

    Raises:
        UserError: ``config`` names another target.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for name in _targets(plain):
        if name not in known:
            raise UserError(
                f"{file} names {name!r} as something to call, but neither conf/ nor this command "
                "names it, and the content of a run's folder is not trusted: name it in conf/ "
                "if it is yours, or delete this folder."
            )
    return OmegaConf.create(plain)


def _targets(plain: Any) -> Iterator[str]:
    if isinstance(plain, str) and "${" in plain:  # Hydra would resolve it after the check
        yield plain
    elif isinstance(plain, dict):
        if "_target_" in plain:
            yield str(plain["_target_"])
        for value in plain.values():
            yield from _targets(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _targets(value)
