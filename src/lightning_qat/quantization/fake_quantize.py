"""Fake-quantisers that clip where the integer kernels clip, and that no device has to wait for.

torch's own keep their switches in tensors and ask their observers, in Python, what those have seen:
a GPU has to be waited for at each of them, and torch.compile cannot follow. Their per-channel
kernel takes 30 times as long on a CPU as the same arithmetic in vectorised steps. Here switches are
Python flags, and rounding is those steps, with the same result to the bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.ao import quantization as tq

# torch's kernels have the same limit. Biases are held in 32 bits, in steps of input scale times
# weight scale: the step of a channel of zeros must not become so small that its bias overflows.
SMALLEST_SCALE = 2.0**-14


def in_steps(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """What ``integers`` stand for; they are overwritten.

    The torch.compile of torch 2.11 gives what comes out of an operation in place no gradient.
    """
    steps = integers.sub_(zero_point)
    return steps * scale if torch.compiler.is_compiling() else steps.mul_(scale)


class _Round(torch.autograd.Function):
    """To multiples of ``scale``; the gradient goes straight through (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        integers = x.mul(1 / scale).round_().add_(zero_point)
        return in_steps(integers, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _RoundAndClip(torch.autograd.Function):
    """The same within integer limits; what is clipped has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int
    ) -> Tensor:
        integers = x.mul(1 / scale).round_().add_(zero_point)
        clipped = integers.clamp(lowest, highest)
        ctx.save_for_backward(clipped == integers)
        return in_steps(clipped, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


def _power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below ``scale``."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


class SwitchedFakeQuantize(tq.FakeQuantize):
    """Observes and rounds by Python flags; the tensors of these names are torch's, and unused.

    Takes the arguments of ``torch.ao.quantization.FakeQuantize``, and:

    Args:
        clip: whether integers end at ``quant_min`` and ``quant_max``; else at the dtype's limits.
        power_of_two: whether scales are rounded up to a power of two, which is a shift in hardware.

    Attributes:
        limits: the lowest and the highest integer.
    """

    def __init__(
        self, *args: Any, clip: bool = False, power_of_two: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.observes = self.rounds = True
        self.power_of_two = power_of_two
        kernel = torch.iinfo(self.dtype)
        self.limits = (self.quant_min, self.quant_max) if clip else (kernel.min, kernel.max)

    def extra_repr(self) -> str:
        """What torch prints of this module."""
        return (
            f"observes={self.observes}, rounds={self.rounds}, quant_min={self.quant_min}, "
            f"quant_max={self.quant_max}, limits={self.limits}, dtype={self.dtype}, "
            f"qscheme={self.qscheme}, scale={self.scale}, zero_point={self.zero_point}"
        )

    def enable_observer(self, enabled: bool = True) -> None:
        """Take what comes in into account for the scale, or not."""
        self.observes = enabled

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round, or pass on what comes in."""
        self.rounds = enabled


def integer_limits(fake_quant: Any) -> tuple[int, int]:
    """The lowest and the highest integer of an activation's fake-quantiser, of ours or torch's.

    torch's of 7 bits count as the kernels' 0..255: a clamp for them would cost more than it mends.
    """
    if isinstance(fake_quant, SwitchedFakeQuantize):
        return fake_quant.limits
    highest = getattr(fake_quant, "quant_max", 255)
    return (fake_quant.quant_min, highest) if highest < 127 else (0, 255)


class KernelRangeFakeQuantize(SwitchedFakeQuantize):
    """Per-tensor fake quantisation that clips where the integer kernels do.

    With ``quant_max=127`` the observed maximum maps to 127, so that the pair sums of AVX2's 8-bit
    products do not saturate. torch's own fake-quantisers then clip at 127 as well, which no integer
    kernel does: those keep values up to 255. Training would learn a clip that deployment does not
    have, so here ``quant_max`` decides the scale and, without ``clip``, the dtype decides the clip.
    """

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 (torch's name)
        """Fake-quantise ``X`` (any shape, float32), first observing it where that is enabled."""
        if self.observes:
            self.activation_post_process(X.detach())
            self.follow_range()
        if not self.rounds:
            return X
        return _RoundAndClip.apply(X, self.scale, self.zero_point, *self.limits)

    def follow_range(self) -> None:
        """Set scale and zero point by the range that the observer has."""
        seen: Any = self.activation_post_process
        scale, zero_point = seen.calculate_qparams()
        # What has been 0 throughout may have any scale. torch's, 2^-23, makes steps of the next
        # layer's sums so small that its bias overflows 32 bits.
        only_zeros = torch.hypot(seen.min_val, seen.max_val) == 0
        scale = torch.where(only_zeros, 1 / (self.quant_max - self.quant_min), scale)
        if self.power_of_two:
            own, scale = scale, _power_of_two(scale)
            if self.qscheme != torch.per_tensor_symmetric:  # whose zero point is the middle
                zero_point = torch.round((zero_point - self.quant_min) * (own / scale))
                zero_point = zero_point + self.quant_min
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)


class MovingAverageObserver(tq.MovingAverageMinMaxObserver):
    """torch's, of whole tensors, without a look at what it has seen so far."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Move the range towards that of ``x_orig`` (any shape); the first is taken as it is."""
        if x_orig.numel():
            for average, now in zip(
                (self.min_val, self.max_val), torch.aminmax(x_orig), strict=True
            ):
                moved = average + self.averaging_constant * (now - average)
                average.copy_(torch.where(torch.isfinite(average), moved, now))
        return x_orig

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Scale, float32, and zero point, int32, of a range that includes 0."""
        low, high = self.min_val.clamp(max=0), self.max_val.clamp(min=0)
        levels = self.quant_max - self.quant_min
        if self.qscheme == torch.per_tensor_symmetric:
            scale = torch.maximum(-low, high).div(levels / 2).maximum(self.eps)
            middle = (self.quant_min + self.quant_max) // 2
            return scale, torch.full_like(scale, middle, dtype=torch.int32)
        scale = (high - low).div(levels).maximum(self.eps)
        zero_point = self.quant_min - torch.round(low / scale)
        return scale, zero_point.clamp(self.quant_min, self.quant_max).to(torch.int32)


class SymmetricFakeQuantize(SwitchedFakeQuantize):
    """Fake quantisation of weights, whose zero point is 0 whatever they are.

    The range is that of the weights at hand, no average, and max|w| is the integer ``quant_max``.
    torch's ``FusedMovingAvgObsFakeQuantize`` does the same, except for channels whose weights all
    have one sign, as those of a 3x3 depthwise or a small 1x1 convolution often have: these get a
    zero point at the end of the range, which ONNX Runtime and oneDNN refuse.
    """

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 (torch's name)
        """Fake-quantise ``X`` (any shape, float32), first observing it where that is enabled."""
        if self.observes:
            self._observe(X.detach())
        if not self.rounds:
            return X
        scale, zero_point = self.scale, self.zero_point
        if self.is_per_channel:
            shape = [-1 if axis == self.ch_axis else 1 for axis in range(X.dim())]
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        if self.observes:  # the largest weight is the highest integer, so nothing is clipped
            return _Round.apply(X, scale, zero_point)
        return _RoundAndClip.apply(X, scale, zero_point, self.quant_min, self.quant_max)

    def _observe(self, weight: Tensor) -> None:
        observer = self.activation_post_process
        # ch_axis is -1 for one scale a tensor
        axes = [axis for axis in range(weight.dim()) if axis != self.ch_axis]
        # not aminmax, which would first copy weights that are channels_last
        low, high = weight.amin(axes), weight.amax(axes)
        if observer.min_val.shape != low.shape:  # the first time
            observer.min_val.resize_(low.shape)
            observer.max_val.resize_(high.shape)
            self.scale.resize_(low.numel())
            self.zero_point.resize_(low.numel())
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
        self.follow_range()

    def follow_range(self) -> None:
        """Set the scale by the range that the observer has."""
        seen: Any = self.activation_post_process
        scale = torch.maximum(-seen.min_val, seen.max_val).div(self.quant_max)
        scale = scale.clamp_min(SMALLEST_SCALE)
        self.scale.copy_((_power_of_two(scale) if self.power_of_two else scale).reshape(-1))
        self.zero_point.zero_()
