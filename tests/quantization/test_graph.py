"""The graph pass on networks as people write them: unmodified."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq

from lightning_qat import UserError
from lightning_qat.quantization.check import check_same_function
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import x86
from tests.quantization.networks import SmallNet


def converted(net: nn.Module, images: Tensor) -> nn.Module:
    """Prepare, check, calibrate on one batch, convert."""
    torch.manual_seed(0)
    net.train()(images)  # batch-norm statistics that mean something
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (images,), {})
    prepared.train()(images)
    return convert(prepared, "x86")


def count(net: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in net.modules())


@pytest.mark.parametrize(
    "name",
    [
        "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
        "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
        "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
        "squeezenet1_1", "vgg11", "vgg11_bn",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_every_family_of_torchvision_converts_unmodified(name: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=10).train()
    images = torch.randn(*((2, 3, 299, 299) if name == "inception_v3" else (4, 3, 64, 64)))
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules())
    model = converted(net, images)
    assert not any(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    integer = count(model, nnq.Conv2d) + count(model, nnq.Linear)
    # the auxiliary heads of googlenet and inception are for training only
    assert integer == layers - {"googlenet": 6, "inception_v3": 3}.get(name, 0)
    assert torch.jit.freeze(torch.jit.script(model))(images).shape == (len(images), 10)


class Functional(nn.Module):
    """Arithmetic by operator, function and method; activations as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.hardswish(self.b(x))
        y = torch.cat([a + b, torch.mul(a, b), a.add(b)], dim=1)
        y = y.relu() * torch.sigmoid(y)
        return y.reshape(y.shape[0], -1)


def test_functions_become_integer_modules() -> None:
    model = converted(Functional(), torch.randn(4, 3, 8, 8))
    assert count(model, nnq.QFunctional) == 5
    assert count(model, nnq.Hardswish) == 1
    assert count(model, nnq.Quantize) == 1
    assert count(model, nnq.DeQuantize) == 1
    assert torch.jit.script(model)(torch.randn(2, 3, 8, 8)).shape == (2, 12 * 64)


class SizesAndNumbers(nn.Module):
    """Sums of sizes and of numbers are no business of integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y * 0.5 + 1).reshape(y.size(0) + x.size(0), -1)


def test_sizes_and_numbers_are_left_alone() -> None:
    model = converted(SizesAndNumbers(), torch.randn(4, 3, 8, 8))
    assert model(torch.randn(2, 3, 8, 8)).shape == (4, 4 * 64 // 2)
    assert count(model, nnq.QFunctional) == 0


class FloatInTheMiddle(nn.Module):
    """GroupNorm and SiLU stay in float between integers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)
        self.act, self.after = nn.SiLU(), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.norm(self.before(x))))


def test_what_has_no_integer_kernel_stays_in_float_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        model = converted(FloatInTheMiddle(), torch.randn(4, 3, 8, 8))
    assert "norm, act" in caplog.text
    assert count(model, nnq.Conv2d) == 2
    assert count(model, nnq.Quantize) == count(model, nnq.DeQuantize) == 2
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4, 4, 4)


def test_the_residual_sum_and_its_relu_are_one_integer_operation() -> None:
    model = converted(SmallNet(), torch.rand(8, 3, 8, 8))
    assert "quantized::add_relu" in str(torch.jit.script(model).inlined_graph)


class SharedConvolution(nn.Module):
    """One convolution called twice: its weights stay shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(self.conv(x)))


def test_a_convolution_called_twice_is_not_fused_with_what_follows_once() -> None:
    model = converted(SharedConvolution(), torch.randn(4, 3, 8, 8))
    assert count(model, nnq.Conv2d) == 1
    assert count(model, nnq.BatchNorm2d) == 1


def test_preparation_keeps_the_training_mode() -> None:
    assert not prepare_qat(SmallNet().eval(), x86(), "x86").training
    assert prepare_qat(SmallNet().train(), x86(), "x86").training


class FunctionalDropout(nn.Module):
    """Dropout as a function, and an attribute that is no size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = F.dropout(self.first(x), p=0.9, training=self.training)
        return torch.cat([self.second(x.mT), x.mT], axis=1) * scale  # type: ignore[call-arg]


def test_dropout_as_a_function_is_off_in_the_int8_model() -> None:
    x, scale = torch.randn(16, 4, 8), torch.tensor(2.0)
    net = FunctionalDropout().train()
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (x, scale), {})
    assert not torch.equal(prepared(x, scale), prepared(x, scale))
    model = convert(prepared, "x86")
    assert torch.equal(model(x, scale), model(x, scale))
    assert model(x, scale).shape == (16, 16, 4)


class TakesItsLength(nn.Module):
    """torch.fx has its own word for this one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x)


def test_a_length_in_forward_is_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"cannot trace TakesItsLength.*Point `target`"):
        prepare_qat(TakesItsLength(), x86(), "x86")
