"""Zeros only, no images at all, NaN and infinity: nothing breaks, and nothing is hidden."""

import math
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq

from lightning_qat import QuantizationAwareTraining
from lightning_qat.deployment.onnx_export import to_onnx
from lightning_qat.errors import UserError
from lightning_qat.quantization import QCONFIGS
from lightning_qat.quantization.bias import round_biases, warn_of_large_biases
from lightning_qat.quantization.convert import convert, quantised_engine
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.networks import SmallModule, loader
from tests.quantization.test_callback import trainer_with


def observed(net: nn.Module, x: Tensor, name: str) -> Any:
    prepared: Any = prepare_qat(net, QCONFIGS[name](), QCONFIGS[name]().engine)
    prepared(x)
    prepared.eval().apply(tq.disable_observer)
    round_biases(prepared)
    return prepared


@pytest.mark.parametrize("name", ["x86", "histogram_ptq", "power_of_two", "lsq", "qnnpack"])
def test_a_layer_behind_a_dead_relu_gives_its_bias_in_every_runtime(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    first, last = net[0], net[2]
    nn.init.constant_(first.bias, -100)  # type: ignore[arg-type]
    nn.init.constant_(last.bias, 1)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 8, 8)
    prepared = observed(net, x, name)
    int8 = convert(prepared, QCONFIGS[name]().engine)
    onnx = onnxruntime.InferenceSession(to_onnx(int8, x).SerializeToString())
    with torch.no_grad():
        expected, found = prepared(x), int8(x)
    assert expected.mean() == pytest.approx(1, abs=0.3)
    assert torch.equal(found, expected)
    assert torch.equal(torch.from_numpy(onnx.run(None, {"images": x.numpy()})[0]), expected)


class DeadBranch(nn.Module):
    """A residual sum whose branch has batch-norm weight 0, as `zero_init_residual` leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.relu(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("name", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_a_dead_branch_adds_nothing_also_in_the_engines_own_kernel(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    prepared = observed(DeadBranch(), x, name)
    int8 = convert(prepared, name)
    with torch.no_grad(), quantised_engine(name):  # as a deployed model for qnnpack has to run
        difference = (prepared(x) - int8(x)).abs() / prepared.add.activation_post_process.scale
    assert difference.max() < 1.5


def test_a_bias_that_no_32_bits_hold_is_said() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 1)
    net = nn.Sequential(layer)
    prepared = observed(net, 1e-5 * torch.ones(2, 4), "x86")
    with pytest.warns(UserWarning, match=r"bias of '0' does not fit into 32 bits"):
        warn_of_large_biases(prepared)
    prepared = observed(net, torch.ones(2, 4), "x86")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_large_biases(prepared)


@pytest.mark.parametrize("name", ["x86", "histogram_ptq", "lsq", "lsq_plus", "w2a2_lsq"])
def test_no_images_give_no_numbers_and_move_no_scale(name: str) -> None:
    torch.manual_seed(0)
    int8: Any
    empty, x = torch.empty(0, 3, 8, 8), torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    prepared: Any = prepare_qat(net, QCONFIGS[name](), "x86")
    assert prepared(empty).shape == (0, 2)
    prepared(x)
    rounds: list[Any] = [m for m in prepared.modules() if isinstance(m, tq.FakeQuantizeBase)]
    scales = [fake_quant.scale.clone() for fake_quant in rounds]
    assert prepared(empty).shape == (0, 2)
    assert all(torch.equal(m.scale, scale) for m, scale in zip(rounds, scales, strict=True))
    int8 = convert(prepared, "x86")
    assert int8(empty).shape == (0, 2)
    assert int8(x).isfinite().all()


class Diverges(SmallModule):
    """Its last batch of each epoch holds a NaN, in its images or in its weights."""

    where = ""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        if self.where == "image" and batch_idx == 3:
            x = x.clone()
            x[0, 0, 0, 0] = math.inf
        loss = super().training_step((x, labels), batch_idx)
        return loss * math.nan if self.where == "loss" and batch_idx == 3 else loss


@pytest.mark.parametrize("name", ["x86", "w4a4_lsq"])
@pytest.mark.parametrize("where", ["loss", "image"])
def test_what_has_become_nan_is_not_converted(where: str, name: str, tmp_path: Path) -> None:
    module, callback = Diverges(), QuantizationAwareTraining(name)
    module.where = where
    with pytest.raises(UserError, match="NaN or infinite, so there is nothing to convert"):
        trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())


class Masked(nn.Module):
    """A mask that lets everything through, as attention has one where nothing is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4,), -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.fc(x), self.mask)  # type: ignore[arg-type]


def test_infinite_masks_are_not_weights() -> None:
    prepared = observed(Masked(), torch.randn(2, 4), "x86")
    assert prepared.mask.isinf().all()
    assert convert(prepared, "x86")(torch.randn(2, 4)).isfinite().all()


@pytest.mark.parametrize("name", ["x86", "w4a4", "lsq"])
def test_fake_quant_passes_nan_on_and_integers_cannot(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    prepared = observed(nn.Sequential(nn.Linear(4, 4)), x, name)
    x[0, 0] = math.nan
    with torch.no_grad():
        assert prepared(x)[0].isnan().all()
        assert convert(prepared, "x86")(x).isfinite().all(), "README: they have no NaN"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["x86", "lsq"])
def test_under_mixed_precision_scales_and_rounding_stay_float32(
    name: str, dtype: torch.dtype
) -> None:
    for make in (QCONFIGS[name]().activation, QCONFIGS[name]().weight):
        fake_quant, reference = make(), make()
        x = (1e-4 * torch.randn(6, 3, 5, 5)).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            found = fake_quant(x)
        assert torch.equal(found, reference(x.detach().float()))
        assert fake_quant.scale.dtype == found.dtype == torch.float32
        assert torch.equal(fake_quant.scale, reference.scale)
        assert (fake_quant.scale > 0).all()
        found.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
