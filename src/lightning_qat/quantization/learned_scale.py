"""Scales that training learns, by gradient, beside the weights.

Esser et al., "Learned Step Size Quantization" (LSQ), ICLR 2020, equations 1 to 3 and section 2.2,
with the offset of Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets
and better initialization", 2020, equations 4 to 6.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quantize import (
    SMALLEST_SCALE,
    SwitchedFakeQuantize,
    in_steps,
)


def learned_scales(net: nn.Module) -> list[nn.Parameter]:
    """The scales and offsets in ``net`` that training learns: a parameter group of their own.

    They want no weight decay, which would draw them to 0, and maybe another learning rate. For
    use in ``configure_optimizers``, when the network has been prepared.
    """
    fake_quants = [x for x in net.modules() if isinstance(x, LearnedScaleFakeQuantize)]
    return [parameter for x in fake_quants for parameter in x.parameters()]


def follow_optimizers(net: nn.Module) -> None:
    """Let what depends on learned scales follow them, after a step: before anything reads them.

    Not in ``forward``: a network may run twice before one backward pass, which wants the scales as
    they were.
    """
    for module in net.modules():
        if isinstance(module, LearnedScaleFakeQuantize):
            module.follow_parameters()


class _LearnedRound(torch.autograd.Function):
    """Round and clip; the scale has a gradient, and the offset, where the clip has one.

    The gradient of a scale is the rounding error where nothing is clipped, else the integer at
    which it is (LSQ, equation 3); that of an offset is 1 where something is clipped (LSQ+,
    equation 6). Both are multiplied by ``gradient_scale``. What comes in has a gradient where it
    rounds into the range, as in torch's fake-quantisers: half a step further than in LSQ, which
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
        integers = x.mul(1 / scale).round_().add_(zero_point).clamp_(*limits)
        return in_steps(integers, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        lowest, highest = ctx.limits
        steps = x.mul(1 / scale)
        rounded = steps.round().add_(zero_point)
        integers = rounded.clamp(lowest, highest)
        # for the scale, clipped is what leaves the range before it is rounded: LSQ, equation 1
        inside = (steps >= lowest - zero_point) & (steps <= highest - zero_point)
        learns_offset = ctx.needs_input_grad[2]
        # with an offset the clipped value is limit * scale + offset, else (limit - zero_point) * s
        clipped = integers if learns_offset else integers - zero_point
        by_scale = torch.where(inside, integers - zero_point - steps, clipped).mul_(gradient)
        axes = [axis for axis in range(x.dim()) if scale.dim() < 2 or scale.shape[axis] == 1]
        for_scale = by_scale.sum(axes, keepdim=scale.dim() > 1).reshape(scale.shape)
        for_offset = None
        if learns_offset:
            for_offset = torch.where(inside, 0, gradient).sum().reshape(1) * ctx.gradient_scale
        for_x = gradient * (integers == rounded)
        return for_x, for_scale * ctx.gradient_scale, for_offset, None, None, None


class LearnedScaleFakeQuantize(SwitchedFakeQuantize):
    """Fake quantisation whose ``scale`` is a Parameter, and whose clip is real.

    The first training step initialises it: scale 2 mean|x| / sqrt(Q) with Q the highest integer
    (LSQ, section 2.1), of weights or of that step's activations. Activations with negative values
    get the zero point of the middle; with ``learns_offset``, range and zero point are those of
    the first step's minimum and maximum, and the zero point is learned, too. After that, observers
    have no say: freezing them does not freeze a learned scale. Of several processes, the first
    one's initial values count.

    Takes the arguments of ``SwitchedFakeQuantize``, and:

    Args:
        learns_offset: LSQ+, for activations.
    """

    scale: Any
    offset: Any
    is_initialised: Tensor

    def __init__(self, *args: Any, learns_offset: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, clip=True, **kwargs)
        del self.scale  # torch's is a buffer
        self.scale = nn.Parameter(torch.ones(1))
        self.offset = nn.Parameter(torch.zeros(1)) if learns_offset else None
        self.register_buffer("is_initialised", torch.zeros(1, dtype=torch.uint8))
        self.is_learning = False  # the same, where no device has to be asked

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 (torch's name)
        """Fake-quantise ``X`` (any shape, float32); the first training step initialises."""
        if self.observes and not self.is_learning and X.numel():
            self._initialise(X.detach().float(), is_training_step=torch.is_grad_enabled())
        if not self.rounds:
            return X
        scale, zero_point = self.scale, self.zero_point
        values = X.numel() // scale.numel()
        if self.is_per_channel:
            shape = [-1 if axis == self.ch_axis else 1 for axis in range(X.dim())]
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        elif self.dtype == torch.quint8:
            values //= max(1, len(X))  # LSQ counts the features of one image
        gradient_scale = 1 / math.sqrt(max(1, values) * self.limits[1])
        return _LearnedRound.apply(X, scale, self.offset, zero_point, self.limits, gradient_scale)

    @torch.no_grad()
    def _initialise(self, x: Tensor, is_training_step: bool) -> None:
        observer: Any = self.activation_post_process
        observer(x)
        lowest, highest = self.limits
        if self.offset is not None:
            scale, zero_point = observer.calculate_qparams()
            self.offset.copy_((lowest - zero_point) * scale)
        elif self.is_per_channel:
            mean = x.abs().mean([axis for axis in range(x.dim()) if axis != self.ch_axis])
            scale, zero_point = 2 * mean / math.sqrt(highest), torch.zeros_like(mean)
        else:
            middle = (lowest + highest + 1) // 2  # 0 for weights
            zero_point = torch.where(observer.min_val < 0, middle, max(lowest, 0)).reshape(1)
            scale = (2 * x.abs().mean() / (highest - zero_point).sqrt()).reshape(1)
        if self.scale.shape != scale.shape:  # when the network is prepared, before any optimizer
            self.scale = nn.Parameter(torch.empty_like(scale))
            self.zero_point.resize_(scale.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.follow_parameters()
        if is_training_step:  # else the network is being prepared
            self.is_initialised.fill_(1)
            self.is_learning = True

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """After an optimizer step: keep the scale positive, and find the zero point."""
        self.scale.clamp_(min=SMALLEST_SCALE)
        if self.offset is not None:
            lowest, highest = self.limits
            zero_point = lowest - torch.round(self.offset / self.scale)
            self.zero_point.copy_(zero_point.clamp_(lowest, highest))

    def _save_to_state_dict(self, *args: Any) -> None:
        nn.Module._save_to_state_dict(self, *args)  # torch's would save the Parameter itself

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # torch's would resize the Parameter
        self.is_learning = bool(self.is_initialised)
