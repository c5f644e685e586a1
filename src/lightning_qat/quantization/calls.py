"""The calls of torch functions that a network makes, each with a name.

A call's name, its *site*, is the path of the module that is running, the function, and a number:
``layer1/0/conv1/conv2d.0``. No module of the network is replaced, so any control flow, subclass or
functional call is seen.
"""

import collections
import dataclasses
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d} | TRANSPOSED
LAYERS = CONVOLUTIONS | {F.linear}
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
RELUS = {F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_}
CLAMPS = RELUS | {F.relu6, F.hardtanh}
# Functions that only move values: what they return has the scale of what they take.
SAME_VALUES = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d,
    torch.max_pool3d, F.dropout, F.dropout2d, torch.flatten, torch.reshape, torch.permute,
    torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.movedim,
    torch.unbind, torch.narrow, Tensor.flatten, Tensor.view, Tensor.reshape, Tensor.transpose,
    Tensor.permute, Tensor.contiguous, Tensor.chunk, Tensor.split, Tensor.unbind,
    Tensor.unsqueeze, Tensor.squeeze, Tensor.expand, Tensor.unflatten, Tensor.movedim,
    Tensor.narrow, Tensor.__getitem__, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
    Tensor.swapaxes, torch.swapaxes, torch.clone, Tensor.clone, Tensor.float, torch.flip,
    torch.roll, Tensor.flip, Tensor.roll, Tensor.repeat, torch.tile, F.dropout1d, F.dropout3d,
    Tensor.tile,
}  # fmt: skip
# What asks a tensor for something else than values.
_QUIET = {
    "__get__", "__set__", "size", "dim", "stride", "numel", "is_floating_point", "__len__",
    "is_contiguous", "ndimension", "nelement", "element_size", "get_device", "__format__",
}  # fmt: skip

# F.multi_head_attention_forward hands itself to the mode as one call. Without that check, its
# projections are seen. The fast path of torch.nn's attention is not taken while a mode is active.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


class Calls(TorchFunctionMode):
    """Names each call below ``network`` and hands it to ``call``."""

    def __init__(self, path: list[str]) -> None:
        super().__init__()
        self.path = path
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_function__(
        self, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Handle one call of a torch function."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _QUIET:
            return function(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        place = f"{self.path[-1]}/{name}" if self.path else name
        number = self.counts[place]
        self.counts[place] = number + 1
        return self.call(f"{place}.{number}", function, args, kwargs)

    def call(self, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the call at ``site``."""
        raise NotImplementedError


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors(item)]


def layer_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, list[Any], dict[str, Any]]:
    """Return input, weight, bias and the other arguments of a call of a function in ``LAYERS``."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False))
    others = {name: value for name, value in kwargs.items() if name not in OPERANDS}
    given |= {name: kwargs[name] for name in OPERANDS if name in kwargs}
    return given["input"], given["weight"], given.get("bias"), list(args[3:]), others


OPERANDS = ("input", "weight", "bias")
