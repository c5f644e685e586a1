"""Fake-quantizers: observe a range, compute scale and zero point from it, round and clip.

Their state is float only: ranges, or learned scales. Scale and zero point are computed from it at
each use, so averaged or restored state needs no correction. No value is copied from a device:
switches are Python flags.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.histogram import Histogram
from lightning_qat.quantization.qconfig import QConfig

# torch's kernels have the same limit. A bias is an int32 with the step input scale * weight scale.
# For a channel of zeros, a smaller step would let its bias overflow.
SMALLEST_SCALE = 2.0**-14
_EPSILON = torch.finfo(torch.float32).eps


class RoundAndClip(torch.autograd.Function):
    """Round to integers within limits. The gradient goes straight through (Bengio et al., 2013).

    Clipped values have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | float, limits: tuple[int, int]
    ) -> Tensor:
        """Return ``(clamp(round(x / scale) + zero_point, *limits) - zero_point) * scale``."""
        integers = x.div(scale).round_().add_(zero_point)
        clipped = integers.clamp(*limits)
        ctx.save_for_backward(clipped == integers)
        return steps(clipped, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Pass the gradient of values that are not clipped."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class Round(torch.autograd.Function):
    """Round to multiples of ``scale``, without clipping."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        """Return ``round(x / scale) * scale``."""
        return steps(x.div(scale).round_(), scale, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient."""
        return gradient, None


def steps(integers: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """Return ``(integers - zero_point) * scale``; overwrite ``integers``.

    Do not multiply in place under torch.compile: torch 2.11 then loses the gradient.
    """
    counted = integers.sub_(zero_point)
    return counted * scale if torch.compiler.is_compiling() else counted.mul_(scale)


def along(values: Tensor, ndim: int, axis: int) -> Tensor:
    """Reshape one value per index of ``axis`` so that it broadcasts over ``ndim`` axes."""
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def power_of_two(scale: Tensor) -> Tensor:
    """Return the smallest power of two that is not below ``scale``."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


class FakeQuantize(nn.Module):
    """The common part of all fake-quantizers.

    Attributes:
        limits: the lowest and the highest integer.
        observes: True while training data may change the range.
        axis: the axis with one scale for each index; None = one scale for the tensor.
        is_known_at_start: True if preparation already sets the range.
    """

    limits: tuple[int, int]
    axis: int | None = None
    is_known_at_start = False

    def __init__(self) -> None:
        super().__init__()
        self.observes = False

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, float32, one for each index of ``axis`` or of shape []."""
        raise NotImplementedError

    def is_observed(self) -> Tensor:
        """Return a bool tensor of shape []: True if the range is known."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the text that torch prints for this module."""
        return f"limits={self.limits}, axis={self.axis}"


class ActivationFakeQuantize(FakeQuantize):
    """Fake quantization of activations by an observed range.

    Args:
        qconfig: the scheme, with the bits of this tensor.
    """

    low: Tensor
    high: Tensor

    def __init__(self, qconfig: QConfig) -> None:
        super().__init__()
        self.qconfig = qconfig
        self.limits = qconfig.activation_limits
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self.histogram = Histogram() if qconfig.observer == "histogram" else None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` (any shape, float). First observe it if that is on."""
        x = x.float()
        if self.observes:
            self._observe(x.detach())
        return RoundAndClip.apply(x, *self.qparams(), self.limits)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        if self.histogram is not None:
            low, high = self.histogram.observe(x, self.qconfig)
            self.low.copy_(low)
            self.high.copy_(high)
            return
        for now, seen in zip(torch.aminmax(x), (self.low, self.high), strict=True):
            if self.qconfig.observer == "min_max":
                moved = torch.minimum(seen, now) if seen is self.low else torch.maximum(seen, now)
            else:
                moved = seen + self.qconfig.averaging_constant * (now - seen)
            seen.copy_(torch.where(torch.isfinite(seen), moved, now))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the range, which includes 0."""
        quant_min, quant_max = self.qconfig.activation_range
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        width = torch.maximum(-low, high) * 2 if self.qconfig.symmetric else high - low
        # A tensor of zeros may have any scale, but a small one lets the next layer's bias overflow.
        width = torch.where(width == 0, 1.0, width)
        scale = width.div(quant_max - quant_min).clamp(min=_EPSILON)
        if self.qconfig.scales == "power_of_two":
            scale = power_of_two(scale)
        if self.qconfig.symmetric:
            return scale, torch.full_like(scale, (quant_min + quant_max) // 2)
        zero_point = quant_min - torch.round(low / scale)
        return scale, zero_point.clamp(quant_min, quant_max)

    def is_observed(self) -> Tensor:
        """Return a bool tensor of shape []."""
        return torch.isfinite(self.low)


class WeightFakeQuantize(FakeQuantize):
    """Fake quantization of weights, with zero point 0.

    The range comes from the present weights, and max|w| becomes the integer ``quant_max``.

    Args:
        qconfig: the scheme, with the bits of this layer.
        axis: the axis of the output channels.
        channels: number of output channels.
    """

    largest: Tensor
    is_known_at_start = True

    def __init__(self, qconfig: QConfig, axis: int, channels: int) -> None:
        super().__init__()
        self.qconfig = qconfig
        self.limits = qconfig.weight_limits
        self.axis = axis if qconfig.per_channel else None
        shape = [channels] if qconfig.per_channel else []
        self.register_buffer("largest", torch.full(shape, math.inf))

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize ``weight`` (any shape). First observe it if that is on."""
        weight = weight.float()
        if self.observes:
            self.initialize(weight.detach())
        scale = self.qparams()[0]
        if self.axis is not None:
            scale = along(scale, weight.ndim, self.axis)
        if self.observes:  # the largest weight is the highest integer: no clipping
            return Round.apply(weight, scale)
        return RoundAndClip.apply(weight, scale, 0, self.limits)

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set the range from ``weight``."""
        # abs().amax() would copy the weights.
        others = [i for i in range(weight.ndim) if i != self.axis]
        self.largest.copy_(torch.maximum(-weight.amin(others), weight.amax(others)))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scales and zero points, one for each channel or of shape []."""
        scale = self.largest.div(self.limits[1]).clamp(min=SMALLEST_SCALE)
        if self.qconfig.scales == "power_of_two":
            scale = power_of_two(scale)
        return scale, torch.zeros_like(scale)

    def is_observed(self) -> Tensor:
        """Return a bool tensor of shape []."""
        return torch.isfinite(self.largest).all()
