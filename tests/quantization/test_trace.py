"""Networks whose forward does more than pass one tensor through layers."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torchvision.ops import StochasticDepth

from lightning_qat import UserError
from lightning_qat.quantization.check import check_same_function
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import x86
from tests.quantization.test_graph import converted, count


class Outputs(NamedTuple):
    """As GoogLeNet and Inception have them."""

    logits: Tensor
    extra: Tensor | None


class AuxiliaryHead(nn.Module):
    """A second output in training only, with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.extra = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.dropout(self.body(x).mean((2, 3)), 0.5, self.training)
        if self.training:
            return Outputs(self.head(x), self.extra(x))
        return self.head(x)


def test_outputs_that_only_training_has_are_left_behind() -> None:
    x = torch.randn(4, 3, 8, 8)
    net = AuxiliaryHead().train()
    net(x)
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (x,), {})
    assert isinstance(prepared.train()(x), Outputs)
    assert prepared.eval()(x).shape == (4, 5)
    model = convert(prepared, "x86")
    assert model(x).shape == (4, 5)
    assert count(model, nnq.Linear) == 1
    assert torch.jit.script(model)(x).shape == (4, 5)


class SoftmaxInEvaluation(AuxiliaryHead):
    """Logits for the loss, probabilities for the user."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(x).mean((2, 3)))
        return x if self.training else F.softmax(x, 1)


def test_functions_that_only_evaluation_has_are_kept() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = converted(SoftmaxInEvaluation(), x)
    assert torch.allclose(model(x).sum(1), torch.ones(4))


class OtherLayersInEvaluation(AuxiliaryHead):
    """The head that is trained is not the one that is used."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        return self.head(x) if self.training else self.extra(x)


def test_layers_that_only_evaluation_has_are_refused() -> None:
    with pytest.raises(UserError, match="calls extra in evaluation"):
        prepare_qat(OtherLayersInEvaluation(), x86(), "x86")


class DropPath(nn.Module):
    """As timm has it: looks at `training` and at shapes, so torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1)) < 0.5
        return x * keep * 2


@pytest.mark.parametrize("noise", [DropPath(), StochasticDepth(0.5, "row")])
def test_noise_depends_on_the_mode_and_leaves_no_trace_in_int8(noise: nn.Module) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.noise = nn.Conv2d(3, 3, 3, padding=1), noise

        def forward(self, x: Tensor) -> Tensor:
            return self.noise(self.conv(x)) + x

    x = torch.randn(64, 3, 8, 8)
    net = Noisy()
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (x,), {})
    assert not torch.equal(prepared.train()(x), prepared(x))
    prepared.apply(tq.disable_observer)
    assert torch.equal(prepared.eval()(x), prepared(x))
    model = convert(prepared, "x86")
    assert not any(isinstance(module, type(noise)) for module in model.modules())
    assert count(model, nnq.Quantize) == 1  # nothing goes back to float for the noise
    assert torch.jit.script(model)(x).shape == x.shape


class OptionalArguments(nn.Module):
    """A mask that may be left out, a second image that has layers of its own, a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(
        self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None, flip: bool = False
    ) -> Tensor:
        y = self.left(x)
        if other is not None:
            y = y + self.right(other)
        if mask is not None:
            y = y * mask
        return y.flip(3) if flip else y


class OptionalMask(OptionalArguments):
    """Only the mask is optional."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, None, mask)


def test_an_argument_that_layers_wait_for_counts_as_given() -> None:
    x, mask = torch.randn(4, 3, 8, 8), torch.ones(1)
    net = OptionalArguments()
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (x, x, mask), {})
    assert convert(prepared, "x86")(x, x, mask).shape == (4, 4, 6, 6)


def test_an_argument_without_layers_counts_as_left_out() -> None:
    x = torch.randn(4, 3, 8, 8)
    net = OptionalMask()
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (x,), {})
    with pytest.raises(UserError, match="other optional arguments than it was traced for"):
        check_same_function(before, prepared, (x, torch.ones(1)), {})


class Branches(nn.Module):
    """Control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.conv(x)


class Loops(Branches):
    """A loop as long as the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(image) for image in x])


@pytest.mark.parametrize(
    ("net", "line"), [(Branches(), "if x.mean() > 0:"), (Loops(), "for image in x")]
)
def test_a_network_that_cannot_be_traced_is_refused_with_the_line(
    net: nn.Module, line: str
) -> None:
    with pytest.raises(UserError) as refusal:
        prepare_qat(net, x86(), "x86")
    message = str(refusal.value)
    assert line in message
    assert f"{__file__}:" in message
    assert "Point `target` at a part" in message


def test_a_traceable_part_of_it_is_the_way_out() -> None:
    assert count(converted(Branches().conv, torch.randn(4, 3, 8, 8)), nnq.Conv2d) == 1
