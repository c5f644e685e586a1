"""What may be made of a configuration that a run has left: what conf/ or the command names.

A command line is the user's own. A file that lies in a run's folder may be anybody's, and Hydra
calls whatever its ``_target_`` names.
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
    """Every ``_target_`` of the configuration files below ``folder``."""
    return {name for file in folder.rglob("*.yaml") for name in _TARGET.findall(file.read_text())}


def named_by(config: DictConfig) -> set[str]:
    """Every ``_target_`` that a command and the configuration files it is composed of name."""
    names = {_NETWORK}
    for source in OmegaConf.select(config, "hydra.runtime.config_sources") or ():
        if source.provider in ("main", "command-line"):
            names |= named_in(Path(source.path))
    for override in as_typed(config.hydra.overrides.task):
        names |= set(_TARGET.findall(override))
    return names


def checked(config: Any, known: Collection[str], file: Path) -> DictConfig:
    """A copy of ``config`` without interpolations, to instantiate.

    Args:
        config: a part of what ``file`` holds.
        known: what it may name as ``_target_``.

    Raises:
        UserError: it names something else.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for name in _targets(plain):
        if name not in known:
            raise UserError(
                f"{file} names {name!r} as something to call, which neither conf/ nor this command "
                "does, and what lies in a run's folder is not trusted: name it in conf/ if it is "
                "yours, or delete this folder."
            )
    return OmegaConf.create(plain)


def _targets(plain: Any) -> Iterator[str]:
    if isinstance(plain, str) and "${" in plain:  # would be resolved after it has been checked
        yield plain
    elif isinstance(plain, dict):
        if "_target_" in plain:
            yield str(plain["_target_"])
        for value in plain.values():
            yield from _targets(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _targets(value)
