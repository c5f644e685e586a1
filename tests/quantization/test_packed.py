"""How many bytes a network takes whose weights are packed at their bits."""

import pytest
import torch
from torch.ao import quantization as tq

from lightning_qat.quantization.fake_quantize import SymmetricFakeQuantize
from lightning_qat.quantization.packed import packed_bytes
from lightning_qat.quantization.prepare import Overrides, prepare_qat
from lightning_qat.quantization.qconfig import x86
from tests.quantization.networks import SmallNet, images

CONVOLUTIONS, FC = 8 * 3 * 9 + 2 * 8 * 8 * 9, 4 * 8  # weights of SmallNet
CHANNELS = 3 * 8 + 4  # of its outputs: each has a scale, and a bias, of batch-norm or its own


def with_weights_of(bits: int) -> tq.QConfig:
    weight = SymmetricFakeQuantize.with_args(
        observer=tq.PerChannelMinMaxObserver,
        quant_min=-(2 ** (bits - 1)),
        quant_max=2 ** (bits - 1) - 1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    return tq.QConfig(activation=x86().activation, weight=weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_take_their_bits_and_scales_and_biases_four_bytes(bits: int) -> None:
    net = prepare_qat(SmallNet(), with_weights_of(bits), "x86")
    net(images(4)[0])
    assert packed_bytes(net) == (CONVOLUTIONS + FC) * bits // 8 + 8 * CHANNELS


def test_what_stays_in_float_takes_four_bytes_each() -> None:
    overrides: Overrides = {"fc": None, "block.conv1": x86()}
    net = prepare_qat(SmallNet(), with_weights_of(4), "x86", overrides)
    net(images(4)[0])
    in_4_bits = 8 * 3 * 9 + 8 * 8 * 9
    assert packed_bytes(net) == in_4_bits // 2 + 8 * 8 * 9 + 8 * 3 * 8 + 4 * (FC + 4)
