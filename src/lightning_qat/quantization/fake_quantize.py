"""A fake-quantiser that clips where the integer kernels clip."""

import torch
from torch import Tensor
from torch.ao import quantization as tq


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
