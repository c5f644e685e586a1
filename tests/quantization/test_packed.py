"""The bytes of a network with weights packed at their bits."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_qat.quantization.packed import activation_range, packed_bytes
from lightning_qat.quantization.qconfig import QCONFIGS, QConfig
from tests.deployment.artifacts import calibrated
from tests.quantization.networks import SmallNet, images

CONVOLUTIONS, FC = 8 * 3 * 9 + 2 * 8 * 8 * 9, 4 * 8  # weights of SmallNet
CHANNELS = 3 * 8 + 4  # output channels: each has a scale and a bias


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_take_their_bits_and_scales_and_biases_four_bytes(bits: int) -> None:
    net = calibrated(SmallNet(), images(4)[0], QConfig(weight_bits=bits, wide_ends=False))
    assert packed_bytes(net) == (CONVOLUTIONS + FC) * bits // 8 + 8 * CHANNELS


def test_layers_in_float_take_four_bytes_for_each_weight() -> None:
    overrides = {"fc": None, "block.conv1": QCONFIGS["x86"]}
    four_bits = QConfig(weight_bits=4, wide_ends=False)
    net = calibrated(SmallNet(), images(4)[0], four_bits, overrides)
    in_4_bits = 8 * 3 * 9 + 8 * 8 * 9
    assert packed_bytes(net) == in_4_bits // 2 + 8 * 8 * 9 + 8 * 3 * 8 + 4 * (FC + 4)


def test_a_computed_weight_counts_once() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    assert packed_bytes(calibrated(net, images(4)[0])) == 8 * 3 * 9 + 8 * 8


def test_the_range_of_activations_is_that_of_the_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(4)[0]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    found = {}
    for name in ("x86", "onednn", "tensorrt"):
        said = activation_range(calibrated(SmallNet(), x, QCONFIGS[name]))
        found[name] = said["quant_max"], said["saturates"]
    assert found == {"x86": (255, False), "onednn": (255, True), "tensorrt": (127, True)}
    narrow = dataclasses.replace(QCONFIGS["x86"], activation_bits=4)
    assert activation_range(calibrated(SmallNet(), x, narrow))["quant_max"] == 255
