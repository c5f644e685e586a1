"""Every kind of layer with an integer kernel, and those without: right in both forms."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.nn.utils.parametrizations import weight_norm

from lightning_qat.quantization.check import check_same_function
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.kernels import limitation
from lightning_qat.quantization.prepare import FakeQuantisedNetwork, prepare_qat
from lightning_qat.quantization.qconfig import QCONFIGS
from tests.quantization.random_layers import needs_every_integer
from tests.quantization.test_graph import count


def trained(net: nn.Module, x: Tensor, qconfig: str = "x86") -> FakeQuantisedNetwork:
    """Prepared, checked against the float network, and trained for some steps."""
    torch.manual_seed(0)
    for _ in range(3):
        net.train()(x)
    before = copy.deepcopy(net)
    prepared: Any = prepare_qat(net, QCONFIGS[qconfig](), qconfig)
    check_same_function(before, prepared, (x,), {})
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        prepared(x).pow(2).mean().backward()
        optimizer.step()
    return prepared.eval().apply(tq.disable_observer)


def steps_apart(prepared: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """Difference of the two in steps of the last fake-quantiser."""
    scales: list[Any] = [m.scale for m in prepared.modules() if isinstance(m, tq.FakeQuantizeBase)]
    step = [scale for scale in scales if scale.numel() == 1][-1]
    with torch.no_grad():
        return (prepared(x) - model(x)).abs() / step


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


IMAGE, SIGNAL, VOLUME = (8, 3, 9, 9), (8, 3, 20), (4, 3, 6, 6, 6)
FUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "conv1d": (lambda: chain(nn.Conv1d(3, 6, 3)), SIGNAL, 1),
    "conv1d relu": (lambda: chain(nn.Conv1d(3, 6, 3), nn.ReLU()), SIGNAL, 1),
    "conv1d bn relu": (lambda: chain(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), SIGNAL, 1),
    "conv1d bn relu6": (
        lambda: chain(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU6()), SIGNAL, 1),
    "conv2d bn relu6": (lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6()), IMAGE, 1),
    "conv2d hardtanh": (lambda: chain(nn.Conv2d(3, 6, 3), nn.Hardtanh(-0.31, 0.57)), IMAGE, 1),
    "conv2d bn hardswish": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Hardswish()), IMAGE, 1),
    "conv2d bn leaky": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)), IMAGE, 1),
    "conv2d elu": (lambda: chain(nn.Conv2d(3, 6, 3), nn.ELU(0.7)), IMAGE, 1),
    "conv2d silu": (lambda: chain(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 1)), IMAGE, 2),
    "depthwise": (lambda: chain(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE, 1),
    "dilated": (lambda: chain(nn.Conv2d(3, 6, 3, dilation=2, stride=2)), IMAGE, 1),
    "padding same": (lambda: chain(nn.Conv2d(3, 6, (3, 5), padding="same")), IMAGE, 1),
    "padding valid": (lambda: chain(nn.Conv2d(3, 6, 3, padding="valid")), IMAGE, 1),
    "padding reflect": (
        lambda: chain(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")), IMAGE, 1),
    "conv3d bn relu": (lambda: chain(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ReLU()), VOLUME, 1),
    "transposed 1d bn relu": (
        lambda: chain(nn.ConvTranspose1d(3, 3, 3, 2), nn.BatchNorm1d(3), nn.ReLU()), SIGNAL, 1),
    "transposed 2d, as a U-Net has it": (
        lambda: chain(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)), IMAGE, 2),
    "transposed 2d": (lambda: chain(nn.ConvTranspose2d(3, 3, 3, bias=False)), IMAGE, 1),
    "transposed 2d bn relu": (
        lambda: chain(nn.ConvTranspose2d(3, 3, 4, 2, 1), nn.BatchNorm2d(3), nn.ReLU()), IMAGE, 1),
    "transposed 2d, padded output": (
        lambda: chain(
            nn.Conv2d(3, 4, 1),
            nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4),
        ), IMAGE, 2),
    "transposed 3d bn": (
        lambda: chain(nn.Conv3d(3, 3, 1), nn.ConvTranspose3d(3, 3, 3), nn.BatchNorm3d(3)), VOLUME,
        {"x86": 2, "qnnpack": 1}),
    "transposed, unlike channels": (
        lambda: chain(
            nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), IMAGE,
        {"x86": 1, "qnnpack": 2}),
    "transposed, groups": (
        lambda: chain(
            nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE,
        {"x86": 1, "qnnpack": 2}),
    "linear bn relu": (
        lambda: chain(nn.Flatten(), nn.Linear(243, 6), nn.BatchNorm1d(6), nn.ReLU()), IMAGE, 1),
    "linear on three dimensions": (lambda: chain(nn.Linear(20, 6), nn.ReLU()), SIGNAL, 1),
    "one output": (lambda: chain(nn.Flatten(), nn.Linear(243, 1)), IMAGE, 1),
    "bn before conv": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
                      nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)), IMAGE, 2),
    "upsampled": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2),
                      nn.Conv2d(4, 4, 3)), IMAGE, 2),
    "upsampled bilinear": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"),
                      nn.Conv2d(4, 4, 3)), IMAGE, 2),
    "pixel shuffle": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.ZeroPad2d(1)), IMAGE, 1),
    "zero-initialised bn": (lambda: zero_bn(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), IMAGE, 1),
    "zero-initialised bn, transposed": (
        lambda: zero_bn(nn.ConvTranspose2d(3, 3, 3), nn.BatchNorm2d(3)), IMAGE, 1),
    "bn without weights": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU()), IMAGE, 1),
}  # fmt: skip


def zero_bn(layer: nn.Module, bn: nn.BatchNorm2d) -> nn.Module:
    nn.init.zeros_(bn.weight)
    nn.init.normal_(bn.bias)
    return chain(layer, bn)


LAYERS = (
    nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.Linear,
    nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d,
)  # fmt: skip


@pytest.mark.parametrize("qconfig", ["x86", "qnnpack"])
@pytest.mark.parametrize("name", FUSED)
def test_int8_is_what_was_trained(name: str, qconfig: str) -> None:
    make, shape, layers = FUSED[name]
    torch.manual_seed(0)
    x = torch.randn(shape) * 3
    prepared = trained(make(), x, qconfig)
    assert all(torch.isfinite(value).all() for value in prepared.state_dict().values())
    model = convert(prepared, qconfig)
    integer = sum(count(model, kind) for kind in LAYERS)
    assert integer == (layers if isinstance(layers, int) else layers[qconfig])
    difference = steps_apart(prepared, model, x)
    # one step of qnnpack's convolution, whose scale is 1.7 to 1.9 times that of these behind it
    amplified = {"conv2d bn hardswish": 3.5, "conv2d bn leaky": 2.5}
    assert difference.max() < (amplified.get(name, 1.5) if qconfig == "qnnpack" else 1.5)
    assert (difference < 0.5).double().mean() > 0.99
    if qconfig == "x86":
        assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize(
    ("engine", "layer", "reason"),
    [
        ("fbgemm", nn.ConvTranspose2d(8, 8, 2, 2), "2 x 2"),
        ("x86", nn.ConvTranspose2d(8, 8, 2, 2, output_padding=1), "2 x 2"),
        ("x86", nn.ConvTranspose2d(8, 8, 2, 2), None),
        ("onednn", nn.ConvTranspose2d(8, 8, 3, 2, output_padding=1), "output padding"),
        ("onednn", nn.ConvTranspose2d(8, 8, 1, 2), "stride"),
        ("onednn", nn.ConvTranspose2d(8, 8, 2, 2), None),
    ],
)
def test_transposed_kernels_that_are_wrong_are_not_used(
    engine: str, layer: nn.Module, reason: str | None
) -> None:
    found = limitation(layer, engine)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    "wrong",
    [
        nn.Conv2d(16, 16, (1, 3), padding=(1, 0), groups=16),
        nn.Conv2d(16, 64, 5, padding=(5, 4)),
        nn.Conv2d(16, 16, (3, 1), padding=(0, 1), groups=4),
    ],
    ids=["depthwise", "dense", "columns"],
)
@pytest.mark.parametrize(
    ("engine", "integers"),
    [("x86", 1), pytest.param("onednn", 1, marks=needs_every_integer), ("fbgemm", 2)],
)
def test_onednns_kernels_are_not_used_where_they_read_foreign_memory(
    engine: str, integers: int, wrong: nn.Module
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    prepared = trained(chain(nn.Conv2d(3, 16, 1), copy.deepcopy(wrong)), x, engine)
    model = convert(prepared, engine)
    assert count(model, nnq.Conv2d) == integers
    for _ in range(5):
        assert steps_apart(prepared, model, x).max() < 1.5


def test_relu6_ends_at_6_in_both_forms() -> None:
    x = torch.randn(8, 3, 9, 9)
    first: Any = nn.Conv2d(3, 6, 3)
    nn.init.constant_(first.bias, 8.0)
    prepared = trained(chain(first, nn.ReLU6(), nn.Conv2d(6, 2, 1)), x)
    with torch.no_grad():
        seen: dict[str, Tensor] = {}
        model = convert(prepared, "x86")
        model.get_submodule("1").register_forward_hook(
            lambda module, args, output: seen.update(int8=output.dequantize())
        )
        model(x)
    assert seen["int8"].max().item() == pytest.approx(6, abs=6 / 127)
    assert steps_apart(prepared, model, x).max() < 1.5


class Functional(nn.Module):
    """Activations as functions, with their settings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.a(x), 0.3)
        x = F.hardtanh(self.b(x), -0.5, max_val=0.25)
        x = F.elu(self.b(F.pad(x, (1, 1))), alpha=0.5)
        return F.interpolate(input=F.relu6(self.b(x)), scale_factor=2)


def test_functions_keep_their_settings() -> None:
    x = torch.randn(8, 3, 9, 9)
    prepared = trained(Functional(), x)
    model = convert(prepared, "x86")
    assert count(model, nnq.LeakyReLU) == count(model, nnq.ELU) == 1
    assert count(model, nnq.Quantize) == 2  # the input, and behind the interpolation's keywords
    assert steps_apart(prepared, model, x).max() < 1.5


@pytest.mark.parametrize(
    ("layer", "name", "reason"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "0", "padding_mode='circular'"),
        (nn.Conv2d(3, 4, 2, padding="same"), "0", "padding='same' with an even kernel"),
        (weight_norm(nn.Conv2d(3, 4, 3)), "0", "no exact integer kernel"),
        (nn.Sequential(nn.GroupNorm(3, 3), nn.Conv2d(3, 4, 3)), "0.0", "no exact integer kernel"),
    ],
    ids=["circular", "even kernel", "parametrised", "group norm"],
)
def test_what_must_stay_in_float_is_named_with_the_reason(
    layer: nn.Module, name: str, reason: str
) -> None:
    x = torch.randn(8, 3, 9, 9)
    prepared = trained(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(4, 2, 1)), x)
    assert reason in prepared.in_float[name]
    model = convert(prepared, "x86")
    assert steps_apart(prepared, model, x).max() < 1.5


class Parameterised(nn.Module):
    """A layer scale, as ConvNeXt has: its values span more than eight bits a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor([1e-6, 1e-3, 1.0, 100.0])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


def test_products_with_parameters_keep_the_parameters_precision() -> None:
    x = torch.randn(8, 3, 9, 9)
    prepared = trained(Parameterised(), x)
    model = convert(prepared, "x86")
    assert count(model, nnq.QFunctional) == 0
    with torch.no_grad():
        expected, found = prepared(x), model(x)
    assert (expected - found).abs()[:, 0].max() < 1e-7
