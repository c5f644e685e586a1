"""Read the arguments of the command as the user typed them."""

import re

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

HOW_IT_IS_RUN = ("resume", "launcher")
"""Arguments of this program that do not change the result of a job."""


def as_typed(overrides: ListConfig | list[str]) -> list[str]:
    """Return a list of ``hydra.overrides`` as plain strings.

    Do not iterate over the ListConfig: OmegaConf would try to resolve a ``${seed}`` in an item, and
    the key ``seed`` does not exist there.
    """
    typed = OmegaConf.to_container(overrides, resolve=False)
    return [str(override) for override in typed or ()]


def of_the_job(overrides: list[str]) -> list[str]:
    """Return the overrides that change the result of the job."""
    return [x for x in overrides if x.lstrip("+").partition("=")[0] not in HOW_IT_IS_RUN]


def of_a_sweep(config: DictConfig) -> list[Override]:
    """Return the parsed overrides of the sweeper's ``params`` and of the command."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [f"{name}={value}" for name, value in params.items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*arguments, *as_typed(config.hydra.overrides.task)])


def quoted(path: str) -> str:
    """Return a path as the value of an argument, in quotes if Hydra's grammar requires them.

    Double a backslash only before a quote or at the end, because Hydra reads other backslashes as
    they are.
    """
    if re.fullmatch(r"[\w./:@%+-]+", path, re.ASCII):
        value = OverridesParser.create().parse_override(f"x={path}").value()
        if isinstance(value, str):  # `null`, `true` and `1e3` are none
            return path
    escaped = re.sub(r'(\\*)("|\Z)', lambda x: 2 * x[1] + ('\\"' if x[2] else ""), path)
    return f'"{escaped}"'
