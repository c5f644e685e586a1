"""Layers with a qconfig of their own, and fusing by the user's hand."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import qat as nniqat
from torch.ao.nn.intrinsic import quantized as nniq

from lightning_qat import QuantizationAwareTraining
from lightning_qat.quantization.check import check_same_function
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import x86
from tests.quantization.networks import Block, SmallModule, images, loader
from tests.quantization.test_callback import agreement, trainer_with
from tests.quantization.test_graph import count

FOUR_BITS = tq.QConfig(
    activation=x86().activation,
    weight=tq.FusedMovingAvgObsFakeQuantize.with_args(
        observer=tq.MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    ),
)


def fit(folder: Path, **settings: Any) -> tuple[SmallModule, QuantizationAwareTraining]:
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining(**settings)
    trainer_with(callback, folder=folder).fit(module, loader())
    return module, callback


@pytest.mark.parametrize(
    ("key", "kept", "layer"),
    [
        ("fc", ["fc"], nn.Linear),
        ("block", ["block.conv1", "block.conv2"], nn.Sequential),
        ("block.conv2", ["block.conv2"], nn.Sequential),
        (nn.Linear, ["fc"], nn.Linear),
        (Block, ["block.conv1", "block.conv2"], nn.Sequential),
        (nn.Conv2d, ["stem.0", "block.conv1", "block.conv2"], nn.Sequential),
    ],
)
def test_layers_are_kept_in_float_by_name_or_type(
    key: Any, kept: list[str], layer: type[nn.Module], tmp_path: Path
) -> None:
    module, callback = fit(tmp_path, overrides={key: None})
    reasons = {name for name, why in callback.in_float.items() if "overrides" in why}
    assert set(kept) <= reasons
    model = callback.int8_model
    for name in kept:
        assert type(model.get_submodule(name)) is layer
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.get_submodule(name).modules())
    assert sum(count(model, kind) for kind in (nnq.Conv2d, nnq.Linear)) == 4 - len(kept)
    x, _ = images(count=256, seed=5)
    with torch.no_grad():
        difference = (model(x) - module.eval().net(x)).abs()
    assert difference.max() < 0.05
    assert torch.jit.script(model)(x).shape == (256, 4)


def test_first_and_last_layer_keep_eight_bits_in_a_four_bit_network(tmp_path: Path) -> None:
    _, callback = fit(tmp_path, qconfig=FOUR_BITS, overrides={"stem": "x86", "fc": "x86"})
    largest = {
        name: layer.weight().int_repr().abs().max().item()
        for name, layer in callback.int8_model.named_modules()
        if isinstance(layer, nnq.Conv2d | nnq.Linear)
    }
    assert largest["stem.0"] == largest["fc"] == 127
    assert largest["block.conv1"] <= 8
    assert largest["block.conv2"] <= 8
    assert agreement(callback) > 0.98


def test_the_longest_name_wins_and_names_win_over_types(tmp_path: Path) -> None:
    overrides = {nn.Conv2d: None, "block": "x86", "block.conv1": None}
    _, callback = fit(tmp_path, overrides=overrides)
    assert count(callback.int8_model, nnq.Conv2d) == 1
    assert isinstance(callback.int8_model.get_submodule("block.conv2"), nnq.Conv2d)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block.conv3": None}, "no layer 'block.conv3'.*block.conv1"),
        ({nn.Conv3d: None}, "no layer <class 'torch.nn.modules.conv.Conv3d'>"),
        ({"fc": "x87"}, "qconfig='x87' is unknown"),
        ({"fc": "qnnpack"}, "'fc' is for the engine 'qnnpack'"),
        ({nn.BatchNorm2d: None}, "BatchNorm2d'> changes nothing"),
        ({"block.relu": None}, "'block.relu' changes nothing"),
        ({7: None}, "7 is neither the name of a layer nor a type"),
        (["fc"], "set it to a mapping"),
        ({"": None}, "holds no layer"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(
    overrides: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, overrides=overrides)


def test_everything_in_float_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kept in float by `overrides`"):
        fit(tmp_path, overrides={nn.Conv2d: None, nn.Linear: None})


def test_a_list_of_chains_is_fused_and_nothing_else(tmp_path: Path) -> None:
    module, callback = fit(tmp_path, fuse=[["stem.0", "stem.1"]])
    assert isinstance(module.net.get_submodule("stem.0"), nniqat.ConvBn2d)
    assert type(callback.int8_model.get_submodule("block.bn1")) is nnq.BatchNorm2d
    assert agreement(callback) > 0.9  # batch-norm by itself rounds once more


@pytest.mark.parametrize(
    "fuse", [[["stem.0", "stem.9"]], [["stem.1", "stem.0"]], [["fc", "block"]]]
)
def test_chains_that_cannot_be_fused_are_refused(fuse: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Give lists of names of submodules that follow"):
        fit(tmp_path, fuse=fuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.quantization.resnet18,
        torchvision.models.quantization.mobilenet_v2,
        torchvision.models.quantization.googlenet,
    ],
)
def test_a_network_made_for_eager_quantisation_is_taken_as_it_is(
    make: Callable[..., nn.Module],
) -> None:
    torch.manual_seed(0)
    net = make(weights=None, num_classes=10).train()
    x = torch.randn(4, 3, 64, 64)
    net(x)
    called: list[bool] = []
    fuse_model: Any = net.fuse_model
    net.fuse_model = lambda is_qat: called.append(is_qat) or fuse_model(is_qat)  # type: ignore
    before = copy.deepcopy(net)
    prepared = prepare_qat(net, x86(), "x86")
    check_same_function(before, prepared, (x,), {})
    prepared.train()(x)
    model = convert(prepared, "x86")
    assert called == [True]
    assert count(model, nniq.ConvReLU2d) > 5
    assert not any(type(m) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d) for m in model.modules())
    assert torch.jit.script(model)(x).shape == (4, 10)
