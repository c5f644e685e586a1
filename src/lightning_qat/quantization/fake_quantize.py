"""A fake-quantiser that clips where the integer kernels clip."""

import torch
from torch import Tensor
from torch.ao import quantization as tq

# torch's kernels have the same limit. Biases are held in 32 bits, in steps of input scale times
# weight scale: the step of a channel of zeros must not become so small that its bias overflows.
SMALLEST_SCALE = 2.0**-14


class KernelRangeFakeQuantize(tq.FakeQuantize):
    """Per-tensor fake quantisation that clips only at the dtype's limits.

    With ``quant_max=127`` the observed maximum maps to 127, so that the pair sums of AVX2's 8-bit
    products do not saturate. torch's own fake-quantisers then clip at 127 as well, which no integer
    kernel does: those keep values up to 255. Training would learn a clip that deployment does not
    have, so here ``quant_max`` decides the scale and the dtype decides the clip.

    Takes the arguments of ``torch.ao.quantization.FakeQuantize``.
    """

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 (torch's name)
        """Fake-quantise ``X`` (any shape, float32), first observing it where that is enabled."""
        if self.observer_enabled[0] == 1:
            self.activation_post_process(X.detach())
            scale, zero_point = self.activation_post_process.calculate_qparams()
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        if self.fake_quant_enabled[0] == 1:
            limits = torch.iinfo(self.dtype)
            X = torch.fake_quantize_per_tensor_affine(  # noqa: N806
                X, self.scale, self.zero_point, limits.min, limits.max
            )
        return X


class SymmetricFakeQuantize(tq.FakeQuantize):
    """Fake quantisation of weights, whose zero point is 0 whatever they are.

    The range is that of the weights at hand, no average, and max|w| is the integer ``quant_max``.
    torch's ``FusedMovingAvgObsFakeQuantize`` does the same, except for channels whose weights all
    have one sign, as those of a 3x3 depthwise or a small 1x1 convolution often have: these get a
    zero point at the end of the range, which ONNX Runtime and oneDNN refuse.

    Takes the arguments of ``torch.ao.quantization.FakeQuantize``.
    """

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 (torch's name)
        """Fake-quantise ``X`` (any shape, float32), first observing it where that is enabled."""
        if self.observer_enabled[0] == 1:
            self._observe(X.detach())
        if self.fake_quant_enabled[0] == 0:
            return X
        limits = (self.quant_min, self.quant_max)
        if self.is_per_channel:
            return torch.fake_quantize_per_channel_affine(
                X, self.scale, self.zero_point, self.ch_axis, *limits
            )
        return torch.fake_quantize_per_tensor_affine(X, self.scale, self.zero_point, *limits)

    def _observe(self, weight: Tensor) -> None:
        observer = self.activation_post_process
        if self.is_per_channel:
            low, high = torch.aminmax(weight.movedim(self.ch_axis, 0).flatten(1), dim=1)
        else:
            low, high = torch.aminmax(weight)
        scale = torch.maximum(-low, high).div(self.quant_max).clamp_min(SMALLEST_SCALE)
        observer.min_val.resize_(low.shape).copy_(low)
        observer.max_val.resize_(high.shape).copy_(high)
        self.scale.resize_(scale.numel()).copy_(scale.reshape(-1))
        self.zero_point.resize_(scale.numel()).zero_()
