"""The INT8 network as float operations between quantise and dequantise, which is ONNX's form of it.

Integer weights, scales and zero points are those of the converted network, number by number: what a
runtime makes of the pairs is up to it, but what they mean is what torch's integer kernels compute.
"""

import copy
from collections import Counter
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from lightning_qat.deployment.pixels import NormalisePixels, QuantisePixels
from lightning_qat.quantization.convert import Int8Model
from lightning_qat.quantization.functions import shape_nodes
from lightning_qat.quantization.kernels import CLAMPS, GIVE_TUPLES

_OPERATORS = torch.ops.quantized_decomposed
_WITH_RELU = (
    nniq.ConvReLU1d, nniq.ConvReLU2d, nniq.ConvReLU3d, nniq.LinearReLU,
    nniq.BNReLU2d, nniq.BNReLU3d,
)  # fmt: skip
_TRANSPOSED = nnq.ConvTranspose1d | nnq.ConvTranspose2d | nnq.ConvTranspose3d
_LAYERS = nnq.Conv1d | nnq.Conv2d | nnq.Conv3d | nnq.Linear | _TRANSPOSED
_INTEGER = (
    "torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized", QuantisePixels.__module__
)  # fmt: skip
# The scale and zero point that torch's kernels give these, whatever comes in.
_FIXED = {nn.Sigmoid: (1 / 256, 0), nn.Hardsigmoid: (1 / 256, 0), nn.Tanh: (2 / 256, 128)}


def qdq(int8_model: Int8Model) -> fx.GraphModule:
    """``int8_model`` with every integer tensor as a pair of quantise and dequantise.

    Takes and gives what ``int8_model`` does, and the same numbers up to float32 rounding in front
    of a quantise. Weights stay int8.

    Raises:
        NotImplementedError: an integer kernel has no such form here.
    """
    try:
        model: Any = copy.deepcopy(int8_model)
    except RuntimeError as error:  # three dimensions in qnnpack
        raise NotImplementedError(
            "the weights of this network cannot be read back from its integer kernels "
            f"({str(error).splitlines()[0]}): use qconfig='x86' for it."
        ) from error
    modules = dict(model.named_modules())
    for name in {str(node.target) for node in model.graph.nodes} & modules.keys():
        if type(modules[name]).__module__.startswith(_INTEGER):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _in_float(modules[name]))
    _round_what_stays_integer(model)
    return fx.GraphModule(model, model.graph).eval()


def _round_what_stays_integer(model: fx.GraphModule) -> None:
    """Runtimes look for the pair behind each operation, also where it only moves integers."""
    rounds: dict[fx.Node, nn.Module] = {}  # of the nodes that hold integers
    producers: dict[fx.Node, Rounded] = {}
    shapes = shape_nodes(model.graph)
    calls = Counter(node.target for node in model.graph.nodes if node.op == "call_module")
    for node in list(model.graph.nodes):
        if node.op in ("output", "get_attr") or node in shapes:
            continue
        owner: Any = node.args[0] if node.op == "call_method" else node
        named = node.op == "call_module" or getattr(owner, "op", "") == "get_attr"
        module = model.get_submodule(str(owner.target)) if named else None
        incoming = [rounds[source] for source in node.all_input_nodes if source in rounds]
        if isinstance(module, Rounded):
            rounds[node] = module.round
            if calls[node.target] <= 1:  # a clamp behind one call is none behind the others
                producers[node] = module
        elif isinstance(module, Dequantise) or not incoming:
            continue
        elif type(module) in _FIXED:
            _insert_after(model, node, Round(*_FIXED[type(module)]), rounds)
        elif node.target in GIVE_TUPLES:
            rounds[node] = incoming[0]
        else:
            source = node.all_input_nodes[0]
            if type(module) in CLAMPS and source in producers and len(source.users) == 1:
                _clamp_integers(producers[source], module)  # one step for a runtime
                node.replace_all_uses_with(source)
                model.graph.erase_node(node)
            else:
                _insert_after(model, node, incoming[0], rounds)
    model.graph.lint()


def _insert_after(
    model: fx.GraphModule, node: fx.Node, round_: nn.Module, rounds: dict[fx.Node, nn.Module]
) -> None:
    name = f"round_{node.name}"
    model.add_submodule(name, round_)
    with model.graph.inserting_after(node):
        rounded = model.graph.call_module(name, (node,))
    node.replace_all_uses_with(rounded, lambda user: user is not rounded)
    rounds[rounded] = round_


def _clamp_integers(producer: "Rounded", clamp: Any) -> None:
    """Clamp behind the rounding, as torch's integer kernels do."""
    scale, zero_point, *_ = producer.round.qparams
    low, high = producer.round.limits or (0, 255)
    integers = torch.arange(low, high + 1, dtype=torch.uint8)
    quantised = torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)
    low, high = (int(x) for x in clamp(quantised).int_repr().aminmax())
    if (low, high) != (0, 255):
        producer.round.limits = (low, high)


class Round(nn.Module):
    """To the integers of a scale, and back: any shape, float32."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.qparams = (float(scale), int(zero_point), 0, 255, torch.uint8)
        self.limits: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Quantise and dequantise."""
        integers = _OPERATORS.quantize_per_tensor(x, *self.qparams)
        if self.limits is not None:
            integers = integers.clamp(*self.limits)
        return _OPERATORS.dequantize_per_tensor(integers, *self.qparams)


class Dequantise(nn.Identity):
    """Where integers end: the tensor has been dequantised already."""


class Rounded(nn.Module):
    """An operation and the rounding behind it."""

    def __init__(self, integer: Any) -> None:
        super().__init__()
        self.round = Round(integer.scale, integer.zero_point)
        self.relu = isinstance(integer, _WITH_RELU)

    def finish(self, x: Tensor) -> Tensor:
        """Apply the ReLU that is fused in, if any, and round."""
        return self.round(F.relu(x) if self.relu else x)


class _Arithmetic(Rounded):
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.finish(x + y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self.finish(F.relu(x + y))

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self.finish(x * y)

    def cat(self, x: list[Tensor], dim: int = 0) -> Tensor:
        return self.finish(torch.cat(x, dim))


class _Function(Rounded):
    """What has no weights of its own to round."""

    def __init__(self, integer: Any, function: nn.Module) -> None:
        super().__init__(integer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.function(x))


class _Pixels(Rounded):
    """A table of integers, see ``QuantisePixels``."""

    table: Tensor
    rows: Tensor

    def __init__(self, integer: QuantisePixels) -> None:
        super().__init__(integer)
        self.register_buffer("table", integer.table)
        self.register_buffer("rows", integer.rows)

    def forward(self, images: Tensor) -> Tensor:
        integers = torch.take(self.table, images.long() + self.rows)
        return _OPERATORS.dequantize_per_tensor(integers, *self.round.qparams)


class _Weight(nn.Module):
    """Weights kept as int8, in floats when they are called for."""

    integers: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.per_channel = weight.qscheme() == torch.per_channel_affine
        # never channels_last: the exporter would carry the strides into the graph
        integers = weight.int_repr().clone(memory_format=torch.contiguous_format)
        self.register_buffer("integers", integers)
        if self.per_channel:
            self.register_buffer("scale", weight.q_per_channel_scales().float())
            self.register_buffer("zero_point", weight.q_per_channel_zero_points().to(torch.int8))
        else:
            self.qparams = (weight.q_scale(), weight.q_zero_point(), -128, 127, torch.int8)

    def forward(self) -> Tensor:
        if self.per_channel:
            return _OPERATORS.dequantize_per_channel(
                self.integers, self.scale, self.zero_point, 0, -128, 127, torch.int8
            )
        return _OPERATORS.dequantize_per_tensor(self.integers, *self.qparams)


class _FloatWeight(nn.Module):
    """Channels with zero points of their own, which no runtime has in integers."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.dequantize().contiguous())

    def forward(self) -> Tensor:
        return self.weight


class _Layer(Rounded):
    """A convolution or a linear layer."""

    def __init__(self, integer: Any) -> None:
        super().__init__(integer)
        weight, bias = integer._weight_bias()
        per_channel = weight.qscheme() == torch.per_channel_affine
        asymmetric = per_channel and bool(weight.q_per_channel_zero_points().any())
        self.weight = _FloatWeight(weight) if asymmetric else _Weight(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.function, self.settings = _function_of(integer)
        self.padding: list[int] = []
        if getattr(integer, "padding_mode", "zeros") != "zeros":
            # last dimension first, as F.pad wants it
            self.padding = [p for p in reversed(integer.padding) for _ in range(2)]
            self.padding_mode = integer.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        if self.padding:
            x = F.pad(x, self.padding, self.padding_mode)
        return self.finish(self.function(x, self.weight(), self.bias, *self.settings))


def _function_of(layer: Any) -> tuple[Any, tuple[Any, ...]]:
    """The float function of a layer, and its arguments after input, weight and bias."""
    if isinstance(layer, nnq.Linear):
        return F.linear, ()
    dimensions = len(layer.kernel_size)
    if isinstance(layer, _TRANSPOSED):
        function = getattr(F, f"conv_transpose{dimensions}d")
        places = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return function, places
    padding = (0,) * dimensions if layer.padding_mode != "zeros" else layer.padding
    function = getattr(F, f"conv{dimensions}d")
    return function, (layer.stride, padding, layer.dilation, layer.groups)


def _in_float(integer: Any) -> nn.Module:
    """What computes the same on floats."""
    match integer:
        case nnq.DeQuantize():
            return Dequantise()
        case nnq.FloatFunctional() | NormalisePixels():
            return integer
        case QuantisePixels():
            return _Pixels(integer)
        case nnq.QFunctional():
            return _Arithmetic(integer)
        case nnq.Quantize():
            return _Function(integer, nn.Identity())
        case nnq.Hardswish():
            return _Function(integer, nn.Hardswish())
        case nnq.LeakyReLU():
            return _Function(integer, nn.LeakyReLU(integer.negative_slope))
        case nnq.ELU():
            return _Function(integer, nn.ELU(integer.alpha))
        case nnq.ReLU6():
            return nn.ReLU6()
        case nnq.BatchNorm2d() | nnq.BatchNorm3d():
            kind: Any = nn.BatchNorm2d if isinstance(integer, nnq.BatchNorm2d) else nn.BatchNorm3d
            batch_norm = kind(integer.num_features, integer.eps)
            batch_norm.load_state_dict(integer.state_dict(), strict=False)
            return _Function(integer, batch_norm)
    if isinstance(integer, _LAYERS):
        return _Layer(integer)
    raise NotImplementedError(
        f"{type(integer).__name__} has no form in ONNX here: keep it in float"
    )
