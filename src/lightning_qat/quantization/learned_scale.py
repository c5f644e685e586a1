"""Scales that are trained by gradient together with the weights.

Esser et al., "Learned Step Size Quantization" (LSQ), ICLR 2020, equations 1 to 3 and section 2.2,
with the offset of Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets
and better initialization", 2020, equations 4 to 6.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quantize import SMALLEST_SCALE, FakeQuantize, along, steps
from lightning_qat.quantization.qconfig import QConfig


def learned_scales(module: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales and offsets in ``module``.

    In ``configure_optimizers``, give them their own parameter group without weight decay, because
    weight decay would move them to 0.

    Args:
        module: a LightningModule while ``fit`` runs with the callback.
    """
    learned = [x for x in module.modules() if isinstance(x, LearnedScaleFakeQuantize)]
    return [parameter for x in learned for parameter in x.parameters()]


class _LearnedRound(torch.autograd.Function):
    """Round and clip. The scale has a gradient, and the offset has one for clipped values.

    The gradient of a scale is the rounding error. For a clipped value, it is the integer at which
    the value is clipped (LSQ, equation 3). The gradient of an offset is 1 for clipped values (LSQ+,
    equation 6). Both are multiplied by ``gradient_scale``. The input has a gradient if it rounds
    into the range, as in torch's fake-quantizers. This range is half a step wider than in LSQ, and
    trained ResNet18 better at 2 bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        zero_point: Tensor,
        limits: tuple[int, int],
        gradient_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits, ctx.gradient_scale = limits, gradient_scale
        integers = x.div(scale).round_().add_(zero_point).clamp_(*limits)
        return steps(integers, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        lowest, highest = ctx.limits
        counted = x.div(scale)
        rounded = counted.round().add_(zero_point)
        integers = rounded.clamp(lowest, highest)
        # For the scale, a value is clipped if it is outside the range before rounding: LSQ,
        # equation 1.
        inside = (counted >= lowest - zero_point) & (counted <= highest - zero_point)
        learns_offset = ctx.needs_input_grad[2]
        # With an offset, the clipped value is limit * scale + offset, else (limit - zero_point) *
        # scale.
        clipped = integers if learns_offset else integers - zero_point
        by_scale = torch.where(inside, integers - zero_point - counted, clipped).mul_(gradient)
        axes = [axis for axis in range(x.ndim) if scale.ndim == 0 or scale.shape[axis] == 1]
        for_scale = by_scale.sum(axes, keepdim=scale.ndim > 0)
        for_offset = None
        if learns_offset:
            for_offset = torch.where(inside, 0, gradient).sum() * ctx.gradient_scale
        for_x = gradient * (integers == rounded)
        return for_x, for_scale * ctx.gradient_scale, for_offset, None, None, None


class LearnedScaleFakeQuantize(FakeQuantize):
    """Fake quantization whose ``scale`` is a Parameter, and that really clips.

    The first training step initializes it: scale 2 mean|x| / sqrt(Q) with Q the highest integer
    (LSQ, section 2.1), from the weights or from the activations of that step. Activations with
    negative values get a zero point in the middle. With ``learned_offset``, range and zero point
    start from the minimum and maximum of the first step, and the zero point is learned, too. After
    that, the observers change nothing, so freezing them does not freeze a learned scale. With
    several processes, the initial values of the first process count.

    Args:
        qconfig: the scheme, with the bits of this tensor.
        axis: the axis of a weight's output channels; None for activations.
        channels: number of output channels.
    """

    is_initialized: Tensor
    middle: Tensor

    def __init__(
        self, qconfig: QConfig, axis: int | None = None, channels: int | None = None
    ) -> None:
        super().__init__()
        self.is_weight = axis is not None
        self.limits = qconfig.weight_limits if self.is_weight else qconfig.activation_limits
        self.axis = axis if self.is_weight and qconfig.per_channel else None
        self.offset: nn.Parameter | None = None
        if qconfig.scales == "learned_offset" and not self.is_weight:
            self.offset = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("is_initialized", torch.tensor(0.0))
        self.register_buffer("middle", torch.tensor(0.0))  # the zero point, if it is not learned
        self.is_learning = False  # a copy of is_initialized on the host, so no device must be read
        self.scale = nn.Parameter(torch.ones([] if self.axis is None else [channels or 0]))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` (any shape, float32). The first training step sets the scale."""
        x = x.float()
        if self.observes and not self.is_learning and x.numel():
            self.initialize(x.detach())
            self.is_initialized.fill_(1.0)
            self.is_learning = True
        zero_point = self.qparams()[1]
        scale: Tensor = self.scale
        values = x.numel() // scale.numel()
        if self.axis is not None:
            scale, zero_point = (along(v, x.ndim, self.axis) for v in (scale, zero_point))
        elif not self.is_weight:
            values //= max(1, len(x))  # LSQ counts the features of one image
        gradient_scale = 1 / math.sqrt(max(1, values) * self.limits[1])
        return _LearnedRound.apply(x, scale, self.offset, zero_point, self.limits, gradient_scale)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the initial scale and zero point from the values of ``x``."""
        lowest, highest = self.limits
        if self.offset is not None:
            low, high = (end.clamp(*to) for end, to in zip(x.aminmax(), _ENDS, strict=True))
            scale = ((high - low) / (highest - lowest)).clamp(min=SMALLEST_SCALE)
            self.offset.copy_(torch.round(low / scale) * scale)
        else:
            if not self.is_weight:
                middle = float((lowest + highest + 1) // 2)
                self.middle.copy_(torch.where(x.amin() < 0, middle, float(max(lowest, 0))))
            others = [i for i in range(x.ndim) if i != self.axis]
            mean = x.abs().mean(others) if others else x.abs()
            scale = 2 * mean / (highest - self.middle).sqrt()
        self.scale.copy_(scale.clamp(min=SMALLEST_SCALE))

    @torch.no_grad()
    def follow_optimizer(self) -> None:
        """Keep the scale positive after an optimizer step."""
        self.scale.clamp_(min=SMALLEST_SCALE)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point without gradients."""
        scale = self.scale.detach()
        if self.offset is None:
            return scale, self.middle.expand_as(scale)
        lowest, highest = self.limits
        zero_point = lowest - torch.round(self.offset.detach() / scale)
        return scale, zero_point.clamp(lowest, highest)

    def is_observed(self) -> Tensor:
        """Return a bool tensor of shape []."""
        return self.is_initialized > 0


_ENDS = ((None, 0.0), (0.0, None))  # a range includes 0
