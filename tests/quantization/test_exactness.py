"""Evaluation gives the results of integer kernels, also for odd numbers and few bits."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization import QCONFIGS, QConfig
from lightning_qat.quantization.guards import refuse_what_is_not_finite
from tests.quantization.comparisons import apart
from tests.quantization.networks import SmallNet, images
from tests.quantization.training import forms, trained

BRIGHT = images(64, seed=3)[0] * 1.7  # outside the ranges of the training
HOLDS_255 = torch.cpu._is_vnni_supported()


@pytest.mark.parametrize("name", QCONFIGS)
def test_every_qconfig_gives_the_same_numbers_everywhere(name: str) -> None:
    net = SmallNet()
    quantization: Any = trained(net, images(32)[0], name)
    for call in quantization.plan.calls.values():
        if call.kind != "layer":
            continue
        scheme, own = quantization.plan.weights[call.weight][0], quantization.weight(call.weight)
        weight = net.get_parameter(call.weight)
        assert own.limits == scheme.weight_limits
        assert len(torch.unique(own(weight)[0])) <= 2**scheme.weight_bits
        bits = QCONFIGS[name].weight_bits if "block" in call.layer else 8
        assert scheme.weight_bits == bits, "the first and the last layer keep 8"
    found = forms(net, BRIGHT, QCONFIGS[name].engine)
    assert torch.equal(found.onnx, found.fake_quant)
    if HOLDS_255 or QCONFIGS[name].reduce_range:
        assert apart(found.fake_quant, found.kernels) < 1e-5


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("inputs", "weights", "biases"),
    [
        (1.0, 1.0, 1e3), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1e-4, 1.0, 0.0), (1e4, 1e-3, 1.0),
        (1.0, 1.0, -100.0),
    ],
    ids=["large biases", "zero weights", "black images", "dark images", "large images", "dead"],
)  # fmt: skip
def test_odd_numbers_agree_in_every_runtime(
    inputs: float, weights: float, biases: float, per_channel: bool
) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(),
                             nn.Linear(64, 3))  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(weights)
        net[0].bias.copy_(torch.linspace(0.5, 1, 8) * biases)
        net[2].weight[1] = 0  # a dead channel
    x = images(16)[0] * inputs
    trained(net, x, dataclasses.replace(QCONFIGS["x86"], per_channel=per_channel), lr=0)
    found = forms(net, x)
    assert found.fake_quant.isfinite().all()
    assert torch.equal(found.onnx, found.fake_quant)
    torch.testing.assert_close(found.kernels, found.fake_quant, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1e-12])
@pytest.mark.parametrize("name", ["x86", "qnnpack"])
def test_a_channel_without_weight_in_batch_norm_gives_its_bias_and_costs_the_others_nothing(
    name: str, gamma: float
) -> None:
    outputs = []
    for dead in (False, True):
        torch.manual_seed(0)
        net: Any = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        nn.init.uniform_(net[1].weight, 0.04, 0.06)
        if dead:
            nn.init.constant_(net[1].weight[3:4], gamma)
            nn.init.constant_(net[1].bias[3:4], 0.03)
        trained(net, images(16)[0], name, lr=0)
        found = forms(net, images(16)[0], name)
        assert torch.equal(found.fake_quant, found.onnx)
        if dead:
            step = found.fake_quant.unique().diff().min()
            assert (found.fake_quant[:, 3] - 0.03).abs().max() <= 0.51 * step
        outputs.append(found.fake_quant)
    y = net.train()(images(16)[0])
    (y * torch.randn_like(y)).sum().backward()
    if gamma == 0 or name == "x86":
        assert net[1].weight.grad[3] != 0, "it can never come back"
    rest = [channel for channel in range(8) if channel != 3]
    torch.testing.assert_close(
        outputs[0][:, rest], outputs[1][:, rest], rtol=0, atol=0.02 * outputs[0].std().item()
    )


def test_the_numbers_are_those_of_the_definition_of_integer_arithmetic() -> None:
    """Compute in numpy: sums of integers, an integer bias, one multiplication, one rounding."""
    net: Any = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
    nn.init.uniform_(net[1].weight, -1, 1)
    x = images(16)[0]
    quantization: Any = trained(net, x)
    call = quantization.plan.calls["0/conv2d.0"]
    (scale, zero), (out_scale, out_zero) = (
        [float(v) for v in quantization.activation(name).qparams()]
        for name in (call.inputs[0], call.steps)
    )
    q = np.clip(np.rint(x.numpy() / np.float32(scale)) + zero, 0, 255) - zero
    factor = (net[1].weight / torch.sqrt(net[1].running_var + net[1].eps)).detach().double().numpy()
    step = quantization.weight("0.weight").qparams()[0].double().numpy()
    w = np.rint(net[0].weight.detach().double().numpy()[..., 0, 0] / step[:, None])
    bias = (net[0].bias - net[1].running_mean).detach().double().numpy() * factor
    bias = bias + net[1].bias.detach().double().numpy()
    multiplier = step * np.abs(factor) * scale
    sums = np.einsum("nchw,oc->nohw", q, w * np.sign(factor)[:, None])
    sums += np.rint(bias / multiplier)[None, :, None, None]
    exact = sums * (multiplier / out_scale)[None, :, None, None]
    expected = (np.clip(np.rint(exact) + out_zero, out_zero, 255) - out_zero) * out_scale
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    with torch.no_grad():
        found = net(x).double().numpy()
    assert np.abs(found - expected)[~tie].max() < 1e-5
    assert tie.mean() < 0.01


def test_sums_that_float32_cannot_hold_are_exact() -> None:
    """8,000 products of up to 127 x 127 exceed 2**24. Above that, float32 rounds integers."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(8000, 16))
    with torch.no_grad():
        net[0].weight.abs_()
    x = torch.rand(64, 8000)
    trained(net, x, lr=0)
    found = forms(net, x)
    assert torch.equal(found.onnx, found.fake_quant)


def test_a_bias_of_a_layer_without_weights_of_its_size_survives() -> None:
    """With such small weights, the bias does not fit into 32 bits."""
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with torch.no_grad():
        net[0].weight.mul_(1e-6)
        net[0].bias.copy_(torch.tensor([1.0, 2e6, 3e6, 4e6]))
    x = images(16)[0] * 1e-3
    quantization = trained(net, x, lr=0)
    step = quantization.activation(quantization.plan.calls["0/conv2d.0"].steps).qparams()[0]
    with torch.no_grad():
        found = net[0](x)
    assert (found[:, 3] - 4e6).abs().max() <= step
    assert torch.equal(forms(net, x).onnx, forms(net, x).fake_quant)


class Masked(nn.Module):
    """A mask that lets all values through, as in attention without hidden positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4,), -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.fc(x), self.get_buffer("mask"))


def test_an_infinite_mask_is_no_weight_that_has_diverged() -> None:
    net = Masked()
    quantization = trained(net, torch.randn(4, 4))
    refuse_what_is_not_finite(net, quantization)
    with torch.no_grad():
        net.fc.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"'fc.weight' is NaN or infinite"):
        refuse_what_is_not_finite(net, quantization)


@pytest.mark.parametrize("name", ["x86", "histogram_ptq", "w2a2_lsq"])
def test_no_images_give_no_numbers_and_move_no_scale(name: str) -> None:
    net = SmallNet()
    quantization = trained(net, images(16)[0], name)
    before = quantization.scales()
    net.train()
    quantization.observe(True)
    assert net.stem[0](images(16)[0][:0]).shape == (0, 8, 8, 8)
    quantization.observe(False)
    assert all(
        torch.equal(x, before[key])
        for key, x in quantization.scales().items()
        if key.startswith("activations")
    )
    assert net.eval()(images(16)[0][:0]).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_mixed_precision_evaluation_gives_the_same_numbers(dtype: torch.dtype) -> None:
    net = SmallNet()
    trained(net, images(16)[0])
    x = images(16, seed=4)[0]
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", dtype=dtype):
            found = net(x)
    assert torch.equal(found, expected)


def test_a_clamp_between_layers_does_not_hide_the_range() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Hardtanh(-0.31, 0.57), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip
    trained(net, images(16)[0], QConfig(weight_bits=4, activation_bits=4))
    found = forms(net, BRIGHT)
    assert torch.equal(found.onnx, found.fake_quant)
    assert apart(found.fake_quant, found.kernels) < 1e-5


class SumOfTwo(nn.Module):
    """Add two layers, one of the first channel and one of the second: N x 2 x H x W."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(2, 1, 1, bias=False) for _ in range(2))
        self.last = nn.Conv2d(1, 1, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
            self.second.weight.copy_(torch.tensor([0.0, 0.7]).view(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.second(x))


def test_a_sum_rounds_every_pair_of_integers_as_onnx_runtime_does() -> None:
    net, grid = SumOfTwo(), torch.linspace(-1, 1, 400)
    x = torch.cartesian_prod(grid, 1.5 * grid).T.reshape(1, 2, 400, 400)
    quantization: Any = trained(net, torch.cat([x, x]), lr=0, steps=1)
    # With these ranges, 179 pairs of integers lie so near to a half that the order of float
    # operations decides.
    ranges = {
        "first/conv2d.0": (0.87, 0.38),
        "second/conv2d.0": (0.57, 0.97),
        "/add.0": (0.75, 0.83),
    }
    for name, (low, high) in ranges.items():
        activation: Any = quantization.activation(f"{name}:out")
        activation.low.fill_(-low)
        activation.high.fill_(high)
    found = forms(net, x)
    assert torch.equal(found.onnx, found.fake_quant)


class Padded(nn.Module):
    """Convolutions with TensorFlow's uneven padding: N x 3 x 8 x 8 -> N x 4 x 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Conv2d(8, 8, 3, 2, groups=8)
        self.third = nn.Conv2d(8, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.pad(self.first(x), (0, 1, 0, 1)))
        return self.third(F.pad(x, (0, 1, 0, 1), mode="replicate"))


def test_padding_keeps_the_scale_so_that_values_are_rounded_once() -> None:
    net = Padded()
    quantization: Any = trained(net, images(32)[0])
    assert list(quantization.plan.activations) == [
        "first.0/conv2d.0:in0", "first.0/conv2d.0:out", "second/conv2d.0:out", "third/conv2d.0:out"
    ]  # fmt: skip
    found = forms(net, BRIGHT)
    assert torch.equal(found.onnx, found.fake_quant)


def test_padding_with_another_value_than_0_has_a_scale_of_its_own() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConstantPad2d(1, 9.0), nn.Conv2d(8, 4, 3))
    trained(net, images(32)[0])
    found = forms(net, images(32)[0])
    assert torch.equal(found.onnx, found.fake_quant)
    assert found.fake_quant.abs().max() > 0.5
