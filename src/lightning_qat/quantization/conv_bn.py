"""Convolution, or linear layer, with batch-norm: torch's fake-quantised classes, made cheaper.

The weight that is fake-quantised is the one that the INT8 model will have, batch-norm folded in by
its running statistics (Krishnamoorthi, "Quantizing deep convolutional networks for efficient
inference", 2018, section 3.2.2). Training normalises by the batch, so torch's own classes divide
what the convolution gives by the folded factor again: one more pass over the activations, two more
behind it in the backward pass, and 0 / 0 where a batch-norm's weight is 0. Here the weight is
divided, which is the same function, and small.

In evaluation, and where batch-norm is frozen, the layer computes just what the INT8 model will:
weight and bias folded, no batch-norm behind.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn import intrinsic as nni
from torch.ao.nn.intrinsic import qat as nniqat

ByOutput = Callable[[Tensor], Tensor]
"""A number for each output channel, in a shape that multiplies the weight."""


def folded(
    weight: Tensor, bias: Tensor | None, bn: Any, by_output: ByOutput
) -> tuple[Tensor, Tensor]:
    """What batch-norm with its running statistics makes of a layer's ``weight`` and ``bias``."""
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    shift = -bn.running_mean if bias is None else bias - bn.running_mean
    return weight * by_output(factor), bn.bias + shift * factor


def unfolded_fake_quant(
    weight: Tensor, bn: Any, fake_quant: nn.Module, by_output: ByOutput
) -> Tensor:
    """``weight``, rounded where the folded one would be; batch-norm is to follow.

    A batch-norm weight of 0 leaves no folded weight to round: that channel trains unrounded.
    """
    # only says where to round: its own gradient would be a rounding error, where nothing is clipped
    factor = by_output((bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach())
    gone = factor == 0
    rounded = fake_quant(weight * factor) / torch.where(gone, 1.0, factor)
    return torch.where(gone, weight, rounded)


class _WithBatchNorm:
    """The forward of all of them."""

    weight: Any
    bias: Any
    bn: Any
    weight_fake_quant: Any
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        """N x in x ... -> N x out x ..., float32."""
        if self.bn.training:
            weight = unfolded_fake_quant(
                self.weight, self.bn, self.weight_fake_quant, self._by_output
            )
            output = self.bn(self._conv_forward(input, weight, self.bias))
        else:
            weight, bias = folded(self.weight, self.bias, self.bn, self._by_output)
            output = self._conv_forward(input, self.weight_fake_quant(weight), bias)
        return F.relu(output, inplace=True) if isinstance(self, _WITH_RELU) else output

    def _by_output(self, factor: Tensor) -> Tensor:
        return factor.reshape(-1, *(1,) * (self.weight.dim() - 1))


class ConvBn1d(_WithBatchNorm, nniqat.ConvBn1d):
    """See ``torch.ao.nn.intrinsic.qat.ConvBn1d``."""


class ConvBn2d(_WithBatchNorm, nniqat.ConvBn2d):
    """See ``torch.ao.nn.intrinsic.qat.ConvBn2d``."""


class ConvBn3d(_WithBatchNorm, nniqat.ConvBn3d):
    """See ``torch.ao.nn.intrinsic.qat.ConvBn3d``."""


class ConvBnReLU1d(_WithBatchNorm, nniqat.ConvBnReLU1d):
    """See ``torch.ao.nn.intrinsic.qat.ConvBnReLU1d``."""


class ConvBnReLU2d(_WithBatchNorm, nniqat.ConvBnReLU2d):
    """See ``torch.ao.nn.intrinsic.qat.ConvBnReLU2d``."""


class ConvBnReLU3d(_WithBatchNorm, nniqat.ConvBnReLU3d):
    """See ``torch.ao.nn.intrinsic.qat.ConvBnReLU3d``."""


class LinearBn1d(_WithBatchNorm, nniqat.LinearBn1d):
    """See ``torch.ao.nn.intrinsic.qat.LinearBn1d``."""

    _conv_forward = staticmethod(F.linear)


_WITH_RELU = (ConvBnReLU1d, ConvBnReLU2d, ConvBnReLU3d)

# What fusing leaves -> its fake-quantised form.
QAT_WITH_BATCH_NORM: dict[type[nn.Module], type[nn.Module]] = {
    nni.ConvBn1d: ConvBn1d,
    nni.ConvBn2d: ConvBn2d,
    nni.ConvBn3d: ConvBn3d,
    nni.ConvBnReLU1d: ConvBnReLU1d,
    nni.ConvBnReLU2d: ConvBnReLU2d,
    nni.ConvBnReLU3d: ConvBnReLU3d,
    nni.LinearBn1d: LinearBn1d,
}


def as_torchs_own(module: nn.Module) -> None:
    """Turn ``module`` into torch's class, which ``convert`` folds; it knows them by exact type."""
    if isinstance(module, _WithBatchNorm):
        module.__class__ = type(module).__mro__[2]
