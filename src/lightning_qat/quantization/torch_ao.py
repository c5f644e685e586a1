"""torch's integer kernels: the modules that hold them, what they cannot do, and the INT8 model.

No other file of the core imports torch.ao, which a later version of torch may not have.
"""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq
from torch.fx.graph import CodeGen
from torch.fx.graph_module import reduce_graph_module

from lightning_qat.errors import UserError


@contextmanager
def quantized_engine(engine: str) -> Iterator[None]:
    """Let torch pack and load quantized weights for ``engine``, which is global in torch."""
    previous, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


class Int8Model(fx.GraphModule):
    """A network with torch's integer kernels, on the CPU, in eval mode.

    Input and output are those of the float network. ``meta["in_float"]`` maps the name of each
    layer without an integer kernel to the reason.
    """

    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "engine"]  # noqa: RUF012

    @property
    def engine(self) -> str:
        """The quantized engine of torch that its weights are packed for."""
        return self.meta["engine"]

    def __deepcopy__(self, memo: Any) -> Any:
        with quantized_engine(self.engine):  # torch packs the weights of the copy anew
            return super().__deepcopy__(memo)

    def __reduce__(self) -> tuple[Any, ...]:
        graph = copy.deepcopy(self.graph)
        graph.set_codegen(CodeGen())  # torch traces the code anew, and cannot trace nested inputs
        flat = fx.GraphModule(self, graph)
        _, (body, imports) = fx.GraphModule.__reduce__(flat)[:2]
        data = io.BytesIO()
        torch.save((body, imports, self.meta, self.graph._codegen), data)
        return _load, (self.engine, data.getvalue())

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Model":
        """Convert or move tensors, as ``to``, ``cuda`` and their like do.

        Raises:
            UserError: the model would leave the CPU.
        """
        device = fn(torch.zeros(())).device
        if device.type != "cpu":
            raise UserError(
                f"an INT8 model cannot go to {device}: torch has its integer kernels for the CPU "
                "only. Keep it there, and use the fake-quantized network on the GPU."
            )
        return super()._apply(fn, recurse)


def _load(engine: str, data: bytes) -> Int8Model:
    with quantized_engine(engine):
        body, imports, meta, codegen = torch.load(io.BytesIO(data), weights_only=False)
    for module in body["_modules"].values():
        _complete(module)
    flat = reduce_graph_module(body, imports)
    flat.graph.set_codegen(codegen)
    model = Int8Model(flat, flat.graph)
    model.meta = meta
    return model.eval()


def _complete(module: nn.Module) -> None:
    """Add what ``__setstate__`` of torch's quantized convolutions forgets."""
    if "_modules" not in vars(module):
        state = dict(vars(module))
        nn.Module.__init__(module)
        vars(module).update(state)
    for child in module.children():
        _complete(child)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a lowered graph.

    Attributes:
        name: of the module that it is in the network.
        kind: ``linear``, ``conv2d``, ``conv_transpose2d`` and the like.
        integers: the weight, int8; its zero point is 0.
        scale: of each output channel, float32.
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
        """Return the weight as a tensor of torch.qint8, per tensor where all scales are equal."""
        axis = int(self.is_transposed)
        if self.is_transposed and self.has_one_scale():
            return torch._make_per_tensor_quantized_tensor(self.integers, float(self.scale[0]), 0)
        zeros = torch.zeros(len(self.scale), dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(
            self.integers, self.scale.double(), zeros, axis
        )

    def has_one_scale(self) -> bool:
        """Return True where every output channel has the same scale."""
        return bool((self.scale == self.scale[0]).all())


def limitation(layer: Layer, engine: str) -> str | None:
    """Return why ``engine`` has no right kernel for ``layer``; None where it has one.

    Each was seen in torch 2.15: other numbers than the float operator gives, or an error.
    """
    if engine == "qnnpack" and layer.kind.endswith("3d"):
        return f"{engine} cannot copy or save weights of three dimensions"
    if layer.is_transposed:
        return _limitation_transposed(layer, engine)
    spans = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    if engine in ("x86", "onednn") and any(pad > step * (k - 1) for k, pad, step in spans):
        # oneDNN reads memory there that was never written, in some runs only
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


class FloatOutputLinear(nnq.Linear):
    """A linear layer that takes integers, sums integers, and gives float32 without rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """Take a quantized tensor (..., inputs), of torch.quint8; return (..., outputs)."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x.dequantize(), x.q_scale(), x.q_zero_point(), self._packed_params._packed_params
        )


_MODULES: dict[str, Any] = {
    "linear": (nnq.Linear, nniq.LinearReLU),
    "conv1d": (nnq.Conv1d, nniq.ConvReLU1d),
    "conv2d": (nnq.Conv2d, nniq.ConvReLU2d),
    "conv3d": (nnq.Conv3d, nniq.ConvReLU3d),
    "conv_transpose1d": (nnq.ConvTranspose1d, None),
    "conv_transpose2d": (nnq.ConvTranspose2d, None),
    "conv_transpose3d": (nnq.ConvTranspose3d, None),
}


def has_relu(kind: str) -> bool:
    """Return True where the kernel for ``kind`` can end in a ReLU."""
    return _MODULES[kind][1] is not None


def has_float_output(kind: str, engine: str) -> bool:
    """Return True where the kernel for ``kind`` can give its sums in float32, not rounded."""
    return kind == "linear" and engine in ("x86", "fbgemm")


def integer_module(
    layer: Layer, relu: bool, output: tuple[float, int] | None, engine: str
) -> nn.Module:
    """Return torch's module with the integer kernel for ``layer``.

    Args:
        layer: without ``limitation``.
        relu: end in a ReLU.
        output: scale and zero point of what it gives; None gives float32.
        engine: the quantized engine of torch.
    """
    rows, columns = layer.integers.shape[:2]
    has_bias = layer.bias is not None
    with quantized_engine(engine):
        if layer.kind == "linear":
            make = FloatOutputLinear if output is None else _MODULES["linear"][relu]
            module = make(columns, rows, bias_=has_bias)
        else:
            settings = {
                "kernel_size": layer.kernel_size, "stride": layer.stride,
                "padding": layer.padding, "dilation": layer.dilation,
                "groups": layer.groups, "bias": has_bias,
            }  # fmt: skip
            channels = (columns * layer.groups, rows)
            if layer.is_transposed:
                settings["output_padding"] = layer.output_padding
                channels = (rows, columns * layer.groups)
            module = _MODULES[layer.kind][relu](*channels, **settings)
        module.set_weight_bias(layer.quantized_weight(), layer.bias)
    if output is not None:
        module.scale, module.zero_point = output
    return module.eval()


def torch_script(model: nn.Module) -> torch.jit.ScriptModule:
    """Return ``model`` scripted and frozen: weights become constants.

    torch keeps the code of whatever it scripts as long as the process lives, and freezing puts the
    weights into it. The code of a loaded script is freed with its last user: that is frozen here.

    Args:
        model: an Int8Model, or a module around some, whose inputs are tensors.
    """
    _forget_freed_operators(model)
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(model.eval()), scripted)
    scripted.seek(0)
    engines = {net.engine for net in model.modules() if isinstance(net, Int8Model)}
    with quantized_engine(engines.pop() if engines else torch.backends.quantized.engine):
        return torch.jit.freeze(torch.jit.load(scripted))


def _forget_freed_operators(model: nn.Module) -> None:
    """Take from torch's list of operators the addresses at which ``model`` has something else.

    The list keeps addresses of operators that are freed when torch.library adds to them. In one
    run in dozens (torch 2.15) an attribute comes to lie at one of them, and scripting fails with
    "builtin cannot be used as a value".
    """
    operators = torch.jit._builtins._get_builtin_table()
    for module in model.modules():
        for value in vars(module).values():
            if not callable(value):
                operators.pop(id(value), None)


_OBSERVERS: dict[Any, str] = {
    tq.MovingAverageMinMaxObserver: "moving_average",
    tq.MinMaxObserver: "min_max",
    tq.HistogramObserver: "histogram",
}


def from_torch_qconfig(qconfig: tq.QConfig) -> dict[str, Any]:
    """Return the knobs of our scheme that mean what a QConfig of torch.ao means.

    Returns:
        ``weight``: ``quant_min``, ``quant_max``, ``per_channel``; ``activation``: ``quant_min``,
        ``quant_max``, ``symmetric``; ``observer``; ``averaging_constant``; ``learned``, False.

    Raises:
        UserError: it only observes, or asks for something that no integer kernel can do.
    """
    try:
        activation, weight = qconfig.activation(), qconfig.weight()
    except AssertionError as error:  # torch's words on ranges and schemes
        raise UserError(
            f"this QConfig cannot be made: {error}. Let quant_min and quant_max lie within the "
            "dtype: 0..255 for quint8, -128..127 for qint8."
        ) from error
    for role, fake_quant, dtype in (
        ("activation", activation, torch.quint8),
        ("weight", weight, torch.qint8),
    ):
        _refuse(role, fake_quant, dtype)
    per_channel = _schemes(activation, weight)
    observer: Any = activation.activation_post_process
    if type(observer) not in _OBSERVERS:
        raise UserError(
            f"the activation of this QConfig has a {type(observer).__name__}: use one of "
            f"{', '.join(kind.__name__ for kind in _OBSERVERS)}."
        )
    limits = {
        role: {"quant_min": x.quant_min, "quant_max": x.quant_max}
        for role, x in (
            ("weight", weight.activation_post_process),
            ("activation", observer),
        )
    }
    symmetric = activation.qscheme == torch.per_tensor_symmetric
    return {
        "weight": limits["weight"] | {"per_channel": per_channel},
        "activation": limits["activation"] | {"symmetric": symmetric},
        "observer": _OBSERVERS[type(observer)],
        "averaging_constant": getattr(observer, "averaging_constant", 0.01),
        "learned": False,
    }


def _refuse(role: str, fake_quant: Any, dtype: torch.dtype) -> None:
    if not isinstance(fake_quant, tq.FakeQuantizeBase):
        raise UserError(
            f"the {role} of this QConfig is a {type(fake_quant).__name__}, which observes but "
            "does not fake-quantize, so training would not see any quantization. Use a "
            "FakeQuantize, as torch.ao.quantization.get_default_qat_qconfig does "
            "(get_default_qconfig, without 'qat', is for calibration only)."
        )
    if type(fake_quant) not in (tq.FakeQuantize, tq.FusedMovingAvgObsFakeQuantize):
        raise UserError(
            f"the {role} of this QConfig is a {type(fake_quant).__name__}, which has no "
            "counterpart here: use torch.ao.quantization.FakeQuantize or "
            "FusedMovingAvgObsFakeQuantize, or the name of one of our qconfigs."
        )
    if fake_quant.dtype != dtype:
        raise UserError(
            f"the {role} of this QConfig is {fake_quant.dtype}, and torch's integer kernels "
            f"take {dtype} there: use that."
        )


def _schemes(activation: Any, weight: Any) -> bool:
    """Check the schemes; return True where weights have a scale for each channel."""
    schemes = (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if activation.qscheme not in schemes:
        raise UserError(
            f"the activation of this QConfig is {activation.qscheme}, for which there is no "
            "integer kernel: activations have one scale a tensor (torch.per_tensor_affine)."
        )
    per_channel = weight.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
    if weight.qscheme not in schemes and not (per_channel and weight.ch_axis == 0):
        raise UserError(
            f"the weight of this QConfig is {weight.qscheme} on axis {weight.ch_axis}, for which "
            "there is no integer kernel: weights have one scale a tensor, or one for each output "
            "channel (torch.per_channel_symmetric, ch_axis=0)."
        )
    return per_channel
