"""Layers of a lowered graph: their settings, and the limitations of torch's kernels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {
    "linear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a lowered graph.

    Attributes:
        name: name of its module in the network.
        kind: ``linear``, ``conv2d``, ``conv_transpose2d`` and so on.
        integers: the weight, int8; its zero point is 0.
        scale: scale of each output channel, float32.
        bias: float32, one for each output channel.
        stride, padding, dilation, output_padding: one integer for each dimension; empty for linear.
    """

    name: str
    kind: str
    integers: Tensor
    scale: Tensor
    bias: Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @property
    def is_transposed(self) -> bool:
        """True for transposed convolutions, whose output channels are axis 1 of the weight."""
        return "transpose" in self.kind

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The size of the weight in each dimension of the image."""
        return tuple(self.integers.shape[2:])

    def quantized_weight(self) -> Tensor:
        """Return the weight as a tensor of torch.qint8, per tensor if all scales are equal."""
        axis = int(self.is_transposed)
        if self.is_transposed and self.has_one_scale():
            return torch._make_per_tensor_quantized_tensor(self.integers, float(self.scale[0]), 0)
        zeros = torch.zeros(len(self.scale), dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(
            self.integers, self.scale.double(), zeros, axis
        )

    def has_one_scale(self) -> bool:
        """Return True if every output channel has the same scale."""
        return bool((self.scale == self.scale[0]).all())


def limitation(layer: Layer, engine: str) -> str | None:
    """Return why ``engine`` has no correct kernel for ``layer``; None if it has one.

    Each limitation was seen in torch 2.15: other numbers than the float operator, or an error.
    """
    if engine == "qnnpack" and layer.kind.endswith("3d"):
        return f"{engine} cannot copy or save weights of three dimensions"
    if layer.is_transposed:
        return _limitation_transposed(layer, engine)
    spans = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    if engine in ("x86", "onednn") and any(pad > step * (k - 1) for k, pad, step in spans):
        # oneDNN sometimes reads uninitialized memory there.
        return f"{engine}'s kernel is wrong where whole windows lie in padding"
    return None


def _limitation_transposed(layer: Layer, engine: str) -> str | None:
    inputs, outputs = layer.integers.shape[:2]
    if not layer.has_one_scale() and (engine != "qnnpack" or layer.groups > 1):
        return f"{engine} has no transposed kernel with a scale for each channel"
    if engine == "qnnpack":
        return None
    if layer.groups > 1 or inputs != outputs:
        return f"{engine}'s kernel is wrong with groups, or unlike numbers of channels"
    padded = any(layer.output_padding)
    by_fbgemm = engine == "fbgemm" or (engine == "x86" and padded)
    if by_fbgemm and layer.kernel_size == (2, 2):
        return f"{engine}'s kernel is wrong with 2 x 2 weights"
    if engine == "onednn" and padded:
        return f"{engine} has no kernel with output padding"
    if engine == "onednn" and set(layer.kernel_size) == {1} and max(layer.stride) > 1:
        return f"{engine}'s kernel is wrong with 1 x 1 weights and a stride"
    return None


class FloatLayer(nn.Module):
    """A layer that computes in float32 and stores its weight as integers.

    Args:
        layer: a linear layer or a convolution.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.axis = int(layer.is_transposed)
        shape = [-1 if i == self.axis else 1 for i in range(layer.integers.ndim)]
        self.register_buffer("integers", layer.integers)
        self.register_buffer("scale", layer.scale.reshape(shape))
        self.register_buffer("bias", layer.bias)
        self.is_linear, self.transposed = layer.kind == "linear", layer.is_transposed
        self.stride, self.padding = list(layer.stride), list(layer.padding)
        self.dilation, self.output_padding = list(layer.dilation), list(layer.output_padding)
        self.groups = layer.groups

    def weight(self) -> Tensor:
        """Return the weight as a quantized tensor, with a scale for each output channel."""
        scale = self.scale.flatten().double()
        zeros = torch.zeros(len(scale), dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(self.integers, scale, zeros, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return float32, in the shapes of the float layer."""
        # `to(x)`, because freezing would fold a cast of constants into floats of four times the
        # size.
        weight = self.integers.to(x) * self.scale
        if self.is_linear:
            return F.linear(x, weight, self.bias)
        return torch.convolution(
            x, weight, self.bias, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups,
        )  # fmt: skip


def operator_name(node: Any) -> str:
    """Return the operator name of ``node`` without namespace, overload and in-place underscore."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__).removesuffix("_")
    return getattr(node.target, "__name__", str(node.target))


def is_ours(node: Any, name: str) -> bool:
    """Return True if ``node`` calls ``torch.ops.lightning_qat.<name>``."""
    target = getattr(node, "target", None)
    return getattr(target, "overloadpacket", None) is getattr(torch.ops.lightning_qat, name)


def arguments(node: Any) -> dict[str, Any]:
    """Return the arguments of an operator by name, with the defaults."""
    schema = node.target._schema.arguments
    given = dict(zip((x.name for x in schema), node.args, strict=False)) | node.kwargs
    return {x.name: given.get(x.name, x.default_value) for x in schema}


def read_layer(node: Any, value: Callable[[Any], Any]) -> tuple[Layer, list[int]] | None:
    """Return the layer that ``node`` calls, and the zeros that ``pad`` must add to its input.

    Args:
        node: node of a lowered graph, one of LAYERS.
        value: function that returns the tensor of a constant of the graph.

    Returns:
        None if the weight or the bias is not an integer tensor, or if a convolution has no batch.
    """
    given, kind = arguments(node), operator_name(node)
    weight, bias = given["weight"], given["bias"]
    constants = [x for x in (weight, bias) if x is not None]
    if not all(is_ours(x, "dequantize_per_channel") for x in constants):
        return None
    integers, scale, _, name = weight.args
    if bias is not None:
        steps, step = (value(x) for x in bias.args[:2])
        bias = (steps.double() * step.double()).float()
    layer = Layer(name or kind, kind, value(integers), value(scale), bias)
    if kind == "linear":
        return layer, []
    dims = layer.integers.ndim - 2
    if node.meta["val"].ndim != dims + 2:
        return None
    padding = given["padding"]
    stride, dilation, added = (
        _spread(given.get(key, 0), dims) for key in ("stride", "dilation", "output_padding")
    )
    zeros: list[int] = []
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, layer.kernel_size, strict=True)]
        padding = [span // 2 for span in spans]
        zeros = [x for span in reversed(spans) for x in (0, span % 2)]
    layer = replace(
        layer, stride=stride, padding=_spread(padding, dims), dilation=dilation,
        output_padding=added, groups=given["groups"],
    )  # fmt: skip
    return layer, zeros if any(zeros) else []


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)
