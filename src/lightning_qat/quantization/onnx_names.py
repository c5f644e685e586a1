"""Name the inputs and outputs of an exported network after the arguments of its forward."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def input_names(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """Name each tensor of an example after its argument, in the order of torch.export.

    A tensor inside a list, a tuple or a dict also has its position or key in its name:
    ``features_0``, ``features_left``.

    Raises:
        TypeError: ``forward`` does not accept these arguments.
    """
    signature = inspect.signature(forward)
    signature.bind(*args, **kwargs)
    positional = [
        p for p in signature.parameters.values() if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)
    ]
    names = []
    for position, value in enumerate(args):
        parameter = positional[min(position, len(positional) - 1)]
        name = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            name = f"{name}_{position - len(positional) + 1}"
        names += _names(name, value)
    return _unique(names + [x for name, value in kwargs.items() for x in _names(name, value)])


def output_names(output: Any) -> list[str]:
    """Name each tensor that a network returns, in the order of torch.export.

    A dict or a dataclass gives its keys; a single tensor is ``output``; the items of a tuple or
    list are ``output_0`` and so on.
    """
    if isinstance(output, Mapping) or dataclasses.is_dataclass(output):
        return _unique([x for key, value in _items(output) for x in _names(str(key), value)])
    return _unique(_names("output", output))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        fields = getattr(value, "_fields", range(len(value)))  # names of a namedtuple
        return list(zip(fields, value, strict=True))
    return []


def _names(name: str, value: Any) -> list[str]:
    if isinstance(value, Tensor):
        return [name]
    return [x for key, item in _items(value) for x in _names(f"{name}_{key}", item)]


def _unique(names: list[str]) -> list[str]:
    """Add a number to repeated names."""
    given: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in given:
            unique, number = f"{name}_{number}", number + 1
        given.append(unique)
    return given
