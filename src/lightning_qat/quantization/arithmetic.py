"""The computation of each planned call: in training, in evaluation, and in a graph to export.

*Training* fake-quantizes inputs, weights and outputs; batch-norm stays as it is.

*Evaluation* computes what integer kernels compute, bit for bit, in floats that hold each integer. A
layer adds products of integers and an int32 bias, multiplies once for each channel (input scale x
weight scale / output scale, batch-norm included) and rounds once. A sum is two multiply-adds, as
ONNX Runtime's QLinearAdd computes it.

*Lowering* writes the operators of ``ops.py`` with the same numbers.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.quantization.calls import (
    LAYERS,
    RELUS,
    Calls,
    layer_arguments,
)
from lightning_qat.quantization.fake_quantize import along
from lightning_qat.quantization.plan import Call

_BIAS_LIMITS = (-(2.0**31), 2.0**31 - 256)  # the largest int32 values that float32 holds
_EXACT = 2.0**24  # float32 holds every integer up to here
_OPS = torch.ops.lightning_qat


class _Straight(torch.autograd.Function):
    """Return the exact value, and hand its gradient to the differentiable one."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _exact(exact: Callable[[], Tensor], differentiable: Callable[[], Tensor]) -> Tensor:
    if not torch.is_grad_enabled():
        return exact()
    trained = differentiable()
    if not trained.requires_grad:
        return exact()
    with torch.no_grad():
        value = exact()
    return _Straight.apply(trained, value)


class _Layer:
    """A layer whose batch-norm is still to come, with the integers that it has added."""

    def __init__(self, call: Call, function: Any, output: Tensor) -> None:
        self.call, self.function, self.output = call, function, output
        self.sums: Tensor | None = None
        self.operands: tuple[Tensor, Tensor, Tensor | None, list[Any], dict[str, Any]]
        self.scale: Tensor
        self.integers: Tensor


class Quantize(Calls):
    """The mode in which a planned network runs.

    Args:
        owner: holds plan, fake-quantizers and the state (training, evaluation or lowering).
    """

    def __init__(self, owner: Any) -> None:
        super().__init__(owner.path)
        self.owner = owner
        self.pending: dict[str, tuple[str, _Layer]] = {}  # site of a batch-norm -> its layer
        self.folded: set[str] = set()  # sites of batch-norms that their layer has taken in
        # first site of a chain -> its value, and the same in steps of the scale at the chain's end
        self.in_steps: dict[str, tuple[Tensor, Tensor]] = {}

    def call(self, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the call at ``site`` as the plan says."""
        call = self.owner.plan.calls.get(site)
        if call is None:
            if function in LAYERS:
                self.owner.meet_unplanned(site)
            return function(*args, **kwargs)
        if call.kind == "layer":
            output = self._layer(call, site, function, args, kwargs)
        elif call.kind == "sum":
            output = self._sum(call, site, function, args, kwargs)
        elif call.kind == "norm":
            output = self._norm(call, site, function, args, kwargs)
        else:
            low, high = _clamp_limits(function, args, kwargs)
            if self.owner.numbers is not None and high is not None:
                # ONNX Runtime fuses no Clip in front of a quantizer
                x = args[0] if args else kwargs["input"]
                return self._quantize(call.output, x, (low, high))
            output = function(*args, **kwargs)
        return self._end(call, function, output, args, kwargs) if call.output else output

    # inputs and outputs -----------------------------------------------------------------------

    def _quantize(self, name: str, x: Tensor, within: tuple[float, float] | None = None) -> Tensor:
        """Fake-quantize ``x``, or write the operators; ``within`` are limits of the real value."""
        owner = self.owner
        if owner.numbers is None:
            return owner.fake_quant(name, x)
        scale, zero_point = owner.numbers[name]
        lowest, highest = owner.activation(name).limits
        if within is not None:
            low, high = (round(end / scale) + zero_point for end in within)
            lowest, highest = max(lowest, low), min(highest, high)
        signed = owner.plan.activations[name].signed
        x = x if x.dtype == torch.float32 else x.float()
        integers = _OPS.quantize(x, scale, zero_point, lowest, highest, signed)
        return _OPS.dequantize(integers, scale, zero_point)

    def _inputs(self, call: Call, operands: list[Tensor]) -> list[Tensor]:
        operands = list(operands)
        names = dict(call.inputs)
        if self.owner.numbers is not None:  # ONNX Runtime looks for the operators beside the layer
            names |= call.again
        for position, name in names.items():
            operands[position] = self._quantize(name, operands[position])
        return operands

    def _qparams(self, name: str) -> tuple[Tensor, Tensor]:
        return self.owner.activation(name).qparams()

    def _end(
        self, call: Call, function: Any, output: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Round a value at the end of a chain."""
        value, counted = self.in_steps.pop(call.follows, (None, None))
        before = (args[0] if args else kwargs["input"]) if call.kind == "clamp" else output
        if counted is None or value is not before:  # a hook has put another value in its place
            return self._quantize(call.output, output)
        fake_quant = self.owner.activation(call.output)
        scale, zero_point = fake_quant.qparams()
        if call.kind == "clamp":
            low, high = _clamp_limits(function, args, kwargs)
            top = None if high is None else high / scale
            counted = counted.clamp(low / scale, top)

        def exact() -> Tensor:
            integers = torch.round(counted).add_(zero_point).clamp_(*fake_quant.limits)
            return integers.sub_(zero_point).mul_(scale)

        return _exact(exact, lambda: self.owner.fake_quant(call.output, output))

    # sums -------------------------------------------------------------------------------------

    def _sum(
        self, call: Call, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        a, b = self._inputs(call, list(args[:2]))
        output = torch.add(a, b)
        if call.steps and self.owner.is_exact:
            with torch.no_grad():
                self.in_steps[site] = output, self._sum_in_steps(call, a, b)
        return output

    def _sum_in_steps(self, call: Call, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum in steps of the output's scale, rounded, less the zero point."""
        names = call.inputs | call.again
        (a_scale, a_zero), (b_scale, b_zero) = (self._qparams(names[i]) for i in (0, 1))
        scale, zero_point = self._qparams(call.steps)
        a, b = (torch.round(a / a_scale).add_(a_zero), torch.round(b / b_scale).add_(b_zero))
        a_ratio, b_ratio = a_scale / scale, b_scale / scale
        # fused multiply-adds, the second input first: exact in float64, then rounded to float32
        zeros = a_ratio.double() * a_zero + (b_ratio * b_zero).double()
        fixed = zero_point - zeros.float()
        first = b.double().mul_(b_ratio.double()).add_(fixed.double()).float()
        total = a.double().mul_(a_ratio.double()).add_(first.double()).float()
        return total.round_().sub_(zero_point)

    # layers -----------------------------------------------------------------------------------

    def _layer(
        self, call: Call, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        x, weight, bias, rest, others = layer_arguments(args, kwargs)
        (x,) = self._inputs(call, [x])
        if site in self.owner.lowered:
            return self._lowered(call, site, function, x, rest, others)
        fold = self._fold(call, weight)

        def trained() -> Tensor:
            folded = weight if fold is None else weight * fold
            rounded = self.owner.fake_quant_weight(call.weight, folded)
            if fold is not None:
                rounded = rounded / fold
            return function(x, rounded, bias, *rest, **others)

        if not self.owner.is_exact and self.owner.numbers is None:
            return trained()
        with torch.no_grad(), _without_autocast(x):
            layer = self._add_integers(call, function, (x, weight, bias, rest, others), fold)
        if self.owner.numbers is None:
            alone = layer.output
            layer.output = _exact(lambda: alone, trained)
        if call.norm:
            self.pending[call.norm] = site, layer
            return layer.output
        return self._finish(layer, site, None, bias, lambda: layer.output)

    def _fold(self, call: Call, weight: Tensor) -> Tensor | None:
        """Return batch-norm's factors, where weights are rounded with batch-norm folded in.

        With one scale for each channel, folding later changes scales only. With one scale for the
        tensor it would give each channel its own, so the factor comes before the rounding. A
        factor of 0 is replaced by the smallest other one, so that the range of weights stays.
        """
        if not call.norm_tensors:
            return None
        gamma, variance, eps = call.norm_tensors
        net = self.owner.net
        factor = 1 / torch.sqrt(net.get_buffer(variance).detach() + eps)
        if gamma:
            factor = factor * net.get_parameter(gamma).detach()
        smallest = torch.where(factor == 0, torch.inf, factor.abs()).amin()
        smallest = torch.where(smallest.isinf(), 1.0, smallest)
        return along(torch.where(factor == 0, smallest, factor), weight.ndim, call.axis)

    def _add_integers(self, call: Call, function: Any, operands: Any, fold: Any) -> _Layer:
        """Compute the sums of integers of a layer, and their value."""
        x, weight, bias, rest, others = operands
        fake_quant = self.owner.weight(call.weight)
        folded = weight.float() if fold is None else weight.float() * fold
        scale = fake_quant.qparams()[0]
        by_channel = scale if fake_quant.axis is None else along(scale, weight.ndim, call.axis)
        integers = torch.round(folded / by_channel).clamp_(*fake_quant.limits)
        channels = integers.shape[call.axis]
        if call.axis:  # of a transposed convolution: groups share the output axis
            channels *= others.get("groups", rest[3] if len(rest) > 3 else 1)
        scale = scale.expand(channels) if scale.ndim == 0 else scale.repeat(channels // len(scale))
        layer = _Layer(call, function, x)
        layer.operands, layer.scale, layer.integers = (
            (x, weight, bias, rest, others),
            scale,
            integers,
        )
        if fold is not None:  # the value is that of the layer alone
            scale = scale / fold.flatten()
        if self.owner.numbers is not None:
            layer.output = function(x, weight, bias, *rest, **others)  # only for its shape
            return layer
        x_scale = self._qparams(self._input_name(call))[0]
        layer.sums = _add_products(
            lambda x: function(x, integers, None, *rest, **others),
            torch.round(x / x_scale),
            integers.abs().sum([i for i in range(integers.ndim) if i != call.axis]).amax(),
        )
        channel = _channel(function, layer.sums, integers)
        layer.output = layer.sums.float() * along(scale * x_scale, layer.sums.ndim, channel)
        if bias is not None:
            layer.output = layer.output + along(bias.float(), layer.sums.ndim, channel)
        return layer

    @staticmethod
    def _input_name(call: Call) -> str:
        return (call.inputs | call.again)[0]

    def _norm(
        self, call: Call, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if site in self.owner.lowered:  # its layer has it folded in
            return x
        start, layer = self.pending.pop(site, ("", None))
        if layer is None or layer.output is not x:  # a hook has put another value in its place
            return function(*args, **kwargs)
        bound = dict(zip(_NORM, args, strict=False)) | kwargs
        with torch.no_grad():
            factor = 1 / torch.sqrt(bound["running_var"] + bound.get("eps", 1e-5))
            if bound.get("weight") is not None:
                factor = factor * bound["weight"]
            bias = layer.operands[2]
            shift = -bound["running_mean"] if bias is None else bias - bound["running_mean"]
            bias = shift * factor
            if bound.get("bias") is not None:
                bias = bias + bound["bias"]
        if layer.call.norm_tensors:  # the factor is in the integers already, but for 0
            factor = (factor != 0).to(factor.dtype)
        self.folded.add(site)
        return self._finish(layer, start, factor, bias, lambda: function(*args, **kwargs))

    def _finish(
        self,
        layer: _Layer,
        site: str,
        factor: Tensor | None,
        bias: Tensor | None,
        differentiable: Callable[[], Tensor],
    ) -> Tensor:
        """Compute a layer with ``factor`` and ``bias`` for each output channel."""
        call, integers, scale = layer.call, layer.integers, layer.scale
        with torch.no_grad():
            factor = torch.ones_like(scale) if factor is None else factor
            bias = torch.zeros_like(scale) if bias is None else bias.float()
            # A negative factor leaves the negatives of integers. One of 0 leaves none, and so does
            # a scale so small that 32 bits would not hold the bias. Groups of a transposed
            # convolution share their scales, which cannot change for one channel.
            channels = integers.shape[call.axis]
            smallest = bias.abs() / (2.0**30 * self._qparams(self._input_name(call))[0])
            smallest = smallest * (len(scale) == channels)
            is_dead = (factor == 0) | (scale * factor.abs() < smallest)
            sign = torch.where(is_dead, 0.0, torch.sign(factor))
            scale = torch.where(is_dead, torch.maximum(scale, smallest), scale * factor.abs())
            if self.owner.numbers is not None:
                integers = integers * along(sign[:channels], integers.ndim, call.axis)
                self._keep_integers(layer, site, integers, scale, bias)
                return self._lowered(
                    call,
                    site,
                    layer.function,
                    *layer.operands[::3],
                    layer.operands[4],
                )
            assert layer.sums is not None
            total, ndim = layer.sums, layer.sums.ndim
            channel = _channel(layer.function, total, integers)
            x_scale = self._qparams(self._input_name(call))[0]
            product = scale * x_scale
            rounded_bias = torch.round(bias / product).clamp_(*_BIAS_LIMITS)
            total = total * along(sign, ndim, channel) + along(rounded_bias, ndim, channel)
            total = total.float()  # kernels convert the int32 sum to float32, too
            real = total * along(product, ndim, channel)
        output = _exact(lambda: real, differentiable)
        if call.steps:
            with torch.no_grad():
                step = self._qparams(call.steps)[0]
                self.in_steps[site] = output, total * along(product / step, ndim, channel)
        return output

    def _keep_integers(
        self, layer: _Layer, site: str, integers: Tensor, scale: Tensor, bias: Tensor
    ) -> None:
        """Keep a layer's integers and scales, so that an exported graph has them as constants."""
        call, lowered = layer.call, self.owner.lowered
        product = scale * self.owner.numbers[self._input_name(call)][0]
        rounded = torch.round(bias / product).clamp_(*_BIAS_LIMITS).to(torch.int32)
        weight_scale = scale[: integers.shape[call.axis]].clone()
        lowered[site] = integers.to(torch.int8), weight_scale, rounded, product
        if call.norm in self.folded:
            lowered[call.norm] = ()

    def _lowered(
        self, call: Call, site: str, function: Any, x: Tensor, rest: list[Any], others: Any
    ) -> Tensor:
        integers, scale, rounded, product = self.owner.lowered[site]
        weight = _OPS.dequantize_per_channel(integers, scale, call.axis, call.layer)
        bias = _OPS.dequantize_per_channel(rounded, product, 0, call.layer)
        return function(x, weight, bias, *rest, **others)


_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _add_products(add: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """Return sums of products of integers, exact: in float32, or in float64 where they are large.

    Args:
        add: the layer, which adds in float32.
        x: its input, integers of at most 255.
        weights: the largest sum of absolute weights of an output channel.
    """
    if torch.compiler.is_compiling() or not (x.abs() > _EXACT / weights).any():
        return add(x)
    sixteens = torch.floor(x / 16)
    return add(sixteens).double() * 16 + add(x - sixteens * 16)


def _channel(function: Any, sums: Tensor, integers: Tensor) -> int:
    return sums.ndim - 1 if function is F.linear else sums.ndim - integers.ndim + 1


def _clamp_limits(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float, float | None]:
    if function in RELUS:
        return 0.0, None
    if function is F.relu6:
        return 0.0, 6.0
    bound = dict(zip(("input", "min_val", "max_val"), args, strict=False)) | kwargs
    return bound.get("min_val", -1.0), bound.get("max_val", 1.0)


def _without_autocast(x: Tensor) -> Any:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()  # torch.export would make a graph of its own of the other
