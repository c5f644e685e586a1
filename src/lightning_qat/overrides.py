"""The arguments of the command, as they were typed."""

import re

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

HOW_IT_IS_RUN = ("resume", "launcher")
"""Arguments of ours that say nothing about a job."""


def as_typed(overrides: ListConfig | list[str]) -> list[str]:
    """One of the lists in ``hydra.overrides``.

    Its items have been parsed already: OmegaConf would interpolate a ``${seed}`` in them anew,
    which has no such key where they stand.
    """
    typed = OmegaConf.to_container(overrides, resolve=False)
    return [str(override) for override in typed or ()]


def of_the_job(overrides: list[str]) -> list[str]:
    """Those that make the job what it is."""
    return [x for x in overrides if x.lstrip("+").partition("=")[0] not in HOW_IT_IS_RUN]


def of_a_sweep(config: DictConfig) -> list[Override]:
    """Those of the sweeper's ``params`` and of the command, parsed, with their sweeps."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [f"{name}={value}" for name, value in params.items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*arguments, *as_typed(config.hydra.overrides.task)])


def quoted(path: str) -> str:
    """A path as the value of an argument, in quotes where Hydra's grammar wants them.

    A backslash is one more only before a quote: Hydra takes others as they are.
    """
    if re.fullmatch(r"[\w./:@%+-]+", path, re.ASCII):
        return path
    escaped = re.sub(r'(\\*)("|\Z)', lambda x: 2 * x[1] + ('\\"' if x[2] else ""), path)
    return f'"{escaped}"'
