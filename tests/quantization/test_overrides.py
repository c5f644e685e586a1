"""Layers with their own qconfig."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining, UserError
from lightning_qat.quantization import QCONFIGS, QConfig
from lightning_qat.quantization.attach import quantization_of
from lightning_qat.quantization.overrides import Overrides
from lightning_qat.quantization.prepare import prepare
from tests.quantization.comparisons import int8_apart, integer_layers
from tests.quantization.networks import Block, SmallModule, SmallNet, images, loader, trainer_with
from tests.quantization.training import forms, trained


def scheme_of(overrides: dict[Any, Any], base: str = "x86", net: nn.Module | None = None) -> Any:
    """Return the quantization of a network with these overrides."""
    net = net or SmallNet()
    found = Overrides(QCONFIGS[base], overrides, None)
    quantization = prepare(net, (images(2)[0],), {}, found.of(net))
    found.refuse_idle()
    return quantization


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        ("fc", {"fc"}),
        ("block", {"block.conv1", "block.conv2"}),
        ("block.conv2", {"block.conv2"}),
        ("block.add", set()),
        (nn.Linear, {"fc"}),
        (Block, {"block.conv1", "block.conv2"}),
        (nn.Conv2d, {"stem.0", "block.conv1", "block.conv2"}),
    ],
)
def test_layers_are_kept_in_float_by_name_or_type(key: Any, kept: set[str]) -> None:
    quantization = scheme_of({key: None})
    assert quantization.plan.in_float == dict.fromkeys(kept, "as overrides ask")
    layers = {name.rpartition(".")[0] for name in quantization.plan.weights}
    assert layers == {"stem.0", "block.conv1", "block.conv2", "fc"} - kept
    sums = [call.layer for call in quantization.plan.calls.values() if call.kind == "sum"]
    # A sum of two values that were not rounded stays in float.
    assert sums == ([] if key in ("block.add", "block", Block, nn.Conv2d) else ["block.add"])


def test_a_network_with_layers_in_float_trains_and_converts(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(overrides={"block.conv1": None, nn.Linear: None})
    trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())
    assert callback.in_float == dict.fromkeys(["block.conv1", "fc"], "as overrides ask")
    assert sorted(integer_layers(callback.int8_model)) == ["block.conv2", "stem.0"]
    assert int8_apart(callback, images(count=256, seed=5)[0]) < 1e-5


def test_the_longest_name_wins_and_names_win_over_types() -> None:
    overrides = {nn.Conv2d: None, "block": QCONFIGS["x86"], "block.conv1": None}
    assert set(scheme_of(overrides).plan.weights) == {"block.conv2.weight", "fc.weight"}


def test_only_one_layer_is_quantized(tmp_path: Path) -> None:
    callback = PostTrainingQuantization("w4a4", only="block.conv2")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(SmallModule(), loader())
    assert integer_layers(callback.int8_model) == ["block.conv2"]
    with pytest.raises(UserError, match=r"no layer 'block.conv3'.*block.conv2"):
        trainer_with(PostTrainingQuantization(only="block.conv3"), folder=tmp_path).fit(
            SmallModule(), loader()
        )


@pytest.mark.parametrize(("base", "own", "limits"), [("x86", "w4a4", 15), ("w4a4", "w2a2_lsq", 3)])
def test_the_bits_of_one_layer_are_those_of_what_it_takes_in(
    base: str, own: str, limits: int
) -> None:
    net = SmallNet()
    overrides = Overrides(QCONFIGS[base], {"block.conv2": QCONFIGS[own]}, None)
    quantization: Any = trained(net, images(32)[0], qconfig_of=overrides.of(net))
    assert quantization.activation("block/conv1/conv2d/0:out").limits == (0, limits)
    found = forms(net, images(32, seed=3)[0])
    assert torch.equal(found.onnx, found.fake_quant)


def test_both_sides_of_a_sum_and_the_ends_keep_8_bits() -> None:
    quantization: Any = scheme_of({}, "w2a2")
    limits = {name: x.limits for name, x in quantization.activations.items()}
    narrow = {"block/conv1/conv2d/0:out", "stem/0/conv2d/0:out"}  # inputs of the layers with 2 bits
    assert {name for name, x in limits.items() if x == (0, 3)} == narrow
    assert {x for name, x in limits.items() if name not in narrow} == {(0, 255)}
    everywhere = QConfig(weight_bits=4, activation_bits=4, wide_ends=False)
    net = SmallNet()
    found: Any = prepare(net, (images(2)[0],), {}, lambda _: everywhere)
    assert {x.limits[1] for x in found.weights.values()} == {7}


class SharesAWeight(nn.Module):
    """The first, the second and the last layer share one weight, at 8, 2 and 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(192, 192) for _ in range(3))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.flatten(1)).relu())
        return self.third(x.relu())[:, :4]


def test_layers_that_share_a_weight_stay_tied_and_agree() -> None:
    net = SharesAWeight()
    trained(net, images(32)[0], "w2a4")
    assert net.first.weight is net.second.weight
    found = forms(net, images(32, seed=3)[0])
    torch.testing.assert_close(found.kernels, found.fake_quant, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_int8")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block.conv3": None}, "no layer 'block.conv3'.*block.conv1"),
        ({nn.Conv3d: None}, "no layer of the type Conv3d"),
        ({"fc": "x87"}, "qconfig='x87' is unknown"),
        ({"fc": "qnnpack"}, "'fc' is for the engine 'qnnpack'"),
        ({nn.BatchNorm2d: None}, "'BatchNorm2d' changes nothing"),
        ({"block.relu": None}, "'block.relu' changes nothing"),
        ({7: None}, "7 is neither the name of a layer nor a type"),
        (["fc"], "set it to a mapping"),
        ({nn.Conv2d: None, nn.Linear: None}, "calls no layer that could be quantized"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(
    overrides: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trainer_with(QuantizationAwareTraining(overrides=overrides), folder=tmp_path).fit(
            SmallModule(), loader()
        )


def test_a_network_quantized_otherwise_is_refused(no_int8: Any, tmp_path: Path) -> None:
    module = SmallModule()
    trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    assert quantization_of(module.net)
    for callback in (
        QuantizationAwareTraining("qnnpack"), QuantizationAwareTraining(overrides={"fc": None})
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"quantized already, as .*x86"):
            trainer_with(callback, folder=tmp_path).fit(module, loader())
