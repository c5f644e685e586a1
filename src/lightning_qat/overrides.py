"""The arguments of the command, as they were typed."""

from omegaconf import ListConfig, OmegaConf


def as_typed(overrides: ListConfig | list[str]) -> list[str]:
    """One of the lists in ``hydra.overrides``.

    Its items have been parsed already: OmegaConf would interpolate a ``${seed}`` in them anew,
    which has no such key where they stand.
    """
    typed = OmegaConf.to_container(overrides, resolve=False)
    return [str(override) for override in typed or ()]
