"""Biases that every integer runtime can hold exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.quantization.bias import round_biases
from lightning_qat.quantization.convert import convert
from tests.quantization.networks import SmallModule, images, loader
from tests.quantization.test_callback import trainer_with
from tests.quantization.test_layers import FUSED, LAYERS, chain, trained


def off_the_grid(int8: nn.Module, x: Tensor) -> dict[str, float]:
    """How far the biases of each layer are from whole multiples of the step of its sums."""
    layers: dict[str, Any] = {n: m for n, m in int8.named_modules() if isinstance(m, LAYERS)}
    input_scales: dict[nn.Module, float] = {}
    for layer in layers.values():
        layer.register_forward_pre_hook(
            lambda module, args: input_scales.update({module: args[0].q_scale()})
        )
    int8(x)  # before their weights are read: that breaks qnnpack's conv1d
    found: dict[str, float] = {}
    for name, layer in layers.items():
        weight, bias = layer._weight_bias()
        per_channel = weight.qscheme() == torch.per_channel_affine
        scale = weight.q_per_channel_scales() if per_channel else weight.q_scale()
        if bias is not None:
            multiples = bias.double() / (input_scales[layer] * scale)
            found[name] = (multiples - multiples.round()).abs().max().item()
    return found


CASES: dict[str, Any] = FUSED | {
    "behind relu6": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.Flatten(),
                      nn.Linear(100, 3)), (8, 3, 9, 9), 3),
    "behind sigmoid": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3)), (8, 3, 9, 9), 2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "qconfig"),
    [(name, "x86") for name in CASES]
    # torch cannot read qnnpack's weights of three dimensions back, see tests/deployment/test_qdq.py
    + [(name, "qnnpack") for name in CASES if "3d" not in name],
)
def test_every_bias_is_a_whole_number_of_steps(name: str, qconfig: str) -> None:
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(shape) * 3
    prepared: Any = trained(make(), x, qconfig)
    before = copy.deepcopy(prepared)
    round_biases(prepared)
    off = off_the_grid(convert(prepared, qconfig), x)
    assert off
    assert max(off.values()) < 0.05  # float32 holds five digits of it
    once = copy.deepcopy(prepared.state_dict())
    round_biases(prepared)
    for key, value in prepared.state_dict().items():
        assert torch.allclose(value, once[key], atol=1e-7), key
    with torch.no_grad():  # half a step of a sum is next to nothing
        assert (prepared(x) - before(x)).abs().max() < 0.05 * before(x).abs().max()


def test_without_rounding_they_are_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    prepared = trained(chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), x)
    assert max(off_the_grid(convert(prepared, "x86"), x).values()) > 0.2


@pytest.mark.parametrize("kind", [QuantizationAwareTraining, PostTrainingQuantization])
def test_after_fit_module_and_int8_model_have_the_same_rounded_biases(
    kind: Any, tmp_path: Path
) -> None:
    module, callback = SmallModule(), kind(target="net")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    x, _ = images()
    int8: Any = callback.int8_model
    assert max(off_the_grid(int8, x).values()) < 0.05
    assert torch.equal(int8.fc.bias(), module.net.fc.bias)
    again = copy.deepcopy(module.net).cpu().eval()
    before = copy.deepcopy(again.state_dict())
    round_biases(again)
    for name, value in again.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-7), name


def test_a_layer_with_inputs_of_two_scales_keeps_its_bias() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x) * 5)

    x = torch.randn(8, 3, 9, 9)
    prepared: Any = trained(Twice(), x)
    before = prepared.conv.bias.clone()
    round_biases(prepared)
    assert torch.equal(prepared.conv.bias, before)


@pytest.mark.filterwarnings("ignore:no training step has run")
def test_nothing_is_rounded_to_scales_that_nobody_has_observed(tmp_path: Path) -> None:
    class SkipsItsEpochs(SmallModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            return -1

    module = SkipsItsEpochs()
    before = module.net.fc.bias.detach().clone()
    trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    assert torch.equal(module.net.fc.bias, before)
