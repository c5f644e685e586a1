"""Transposed convolutions with fake-quantised weights, which torch has none of.

Batch-norm is folded as torch's ``ConvBn2d`` folds it (Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018): the weight that is
fake-quantised is the one that the INT8 model will have. Weights have one scale a tensor: torch's
integer kernels know no other for transposed convolutions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import _FusedModule

from lightning_qat.quantization.conv_bn import folded, unfolded_fake_quant


class FloatConvTransposeBn(_FusedModule):
    """What ``fuse_modules_qat`` puts in place of the two, before fake-quantisers exist."""

    def __init__(self, is_qat: bool, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__(conv, bn)


class FakeQuantConvTranspose(nn.modules.conv._ConvTransposeNd):
    """A transposed convolution, and the batch-norm behind it if there is one, for training.

    Input and output are those of nn.ConvTranspose1d, 2d or 3d, by the shape of the weight.
    """

    qconfig: Any
    bn: Any
    weight_fake_quant: Any
    activation_post_process: Any

    @classmethod
    def from_float(
        cls, module: Any, use_precomputed_fake_quant: bool = False
    ) -> "FakeQuantConvTranspose":
        """Take over the layer, or the fused pair, with its Parameters."""
        conv, bn = module if isinstance(module, _FusedModule) else (module, None)
        new: Any = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            True,
            conv.output_padding,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )
        new.weight, new.bias = conv.weight, conv.bias
        new.bn = bn
        new.qconfig = module.qconfig
        new.weight_fake_quant = _per_tensor(module.qconfig)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the fake-quantised weight; in training normalise by the batch."""
        if self.bn is None:
            return self._convolve(input, self.weight_fake_quant(self.weight), self.bias)
        by_output = self._per_output_channel
        if self.bn.training:
            weight = unfolded_fake_quant(self.weight, self.bn, self.weight_fake_quant, by_output)
            return self.bn(self._convolve(input, weight, self.bias))
        weight, bias = folded(self.weight, self.bias, self.bn, by_output)
        return self._convolve(input, self.weight_fake_quant(weight), bias)

    def to_float(self) -> nn.Module:
        """The plain layer with batch-norm folded in, which ``convert`` knows."""
        convolution: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        plain = convolution[len(self.kernel_size) - 1](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            bias=True,
            dilation=self.dilation,
        )
        bias = torch.zeros(self.out_channels) if self.bias is None else self.bias.detach()
        weight = self.weight.detach()
        if self.bn is not None:
            weight, bias = folded(weight, bias, self.bn, self._per_output_channel)
        plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
        fake_quant = self.weight_fake_quant
        plain.qconfig = tq.QConfig(activation=None, weight=lambda: fake_quant)
        plain.activation_post_process = self.activation_post_process
        return plain.eval()

    def _per_output_channel(self, factor: Tensor) -> Tensor:
        """``factor`` (output channels) in the shape of the weight: in x out / groups x kernel."""
        each_group = factor.reshape(self.groups, 1, -1).expand(
            -1, self.in_channels // self.groups, -1
        )
        return each_group.reshape(self.in_channels, -1, *(1,) * len(self.kernel_size))

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        functions: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        return functions[len(self.kernel_size) - 1](
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


def _per_tensor(qconfig: tq.QConfig) -> Any:
    fake_quant = qconfig.weight()
    if fake_quant.qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return fake_quant
    fused = isinstance(fake_quant, tq.FusedMovingAvgObsFakeQuantize)
    observer: Any = tq.MovingAverageMinMaxObserver if fused else tq.MinMaxObserver
    return qconfig.weight.with_args(observer=observer, qscheme=torch.per_tensor_symmetric)()


FUSED_TRANSPOSED: dict[tuple[type[nn.Module], ...], Any] = {
    (nn.ConvTranspose1d, nn.BatchNorm1d): FloatConvTransposeBn,
    (nn.ConvTranspose2d, nn.BatchNorm2d): FloatConvTransposeBn,
    (nn.ConvTranspose3d, nn.BatchNorm3d): FloatConvTransposeBn,
}
