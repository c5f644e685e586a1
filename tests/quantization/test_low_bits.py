"""Fewer than 8 bits, on integer kernels that know 8."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.deployment.onnx_export import to_onnx
from lightning_qat.errors import UserError
from lightning_qat.quantization import QCONFIGS, make_qconfig
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.networks import SmallModule, loader
from tests.quantization.random_layers import needs_every_integer
from tests.quantization.test_callback import trainer_with

LOW = [name for name in QCONFIGS if name.startswith("w")]


def fitted(folder: Path, qconfig: Any, **kwargs: Any) -> QuantizationAwareTraining:
    torch.manual_seed(0)
    callback = QuantizationAwareTraining(qconfig, **kwargs)
    trainer_with(callback, folder=folder).fit(SmallModule(), loader())
    return callback


def bright() -> Tensor:
    """Images whose activations leave the ranges that were seen."""
    return 4 * torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(3)).round()


class Integers(fx.Interpreter):
    """Runs an INT8 model, and keeps the highest integers that layers take in and give."""

    def __init__(self, int8: Any) -> None:
        super().__init__(int8)
        self.highest: dict[str, int] = {}
        self.given: dict[str, int] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if hasattr(self.module.get_submodule(target), "_weight_bias"):  # type: ignore[union-attr]
            self.highest[target] = int(args[0].int_repr().max())
            self.given[target] = int(super().call_module(target, args, kwargs).int_repr().max())
        return super().call_module(target, args, kwargs)


@pytest.mark.parametrize("name", LOW)
def test_layers_multiply_integers_of_their_bits(name: str, tmp_path: Path) -> None:
    int8: Any = fitted(tmp_path, name).int8_model
    knobs = QCONFIGS[name]().knobs
    weights = {
        layer: module._weight_bias()[0].int_repr()
        for layer, module in int8.named_modules()
        if hasattr(module, "_weight_bias")
    }
    highest = 2 ** (knobs["weight_bits"] - 1) - 1
    for layer in ("block.conv1", "block.conv2"):
        assert weights[layer].max() <= highest
        assert weights[layer].min() >= -highest - 1
    assert weights["stem.0"].max() > 100, "the first layer keeps 8 bits"
    assert weights["fc"].max() > 100, "and so does the last"

    integers = Integers(int8)
    integers.run(bright())
    if knobs["activation_bits"] < 8:
        most = 2 ** knobs["activation_bits"] - 1
        assert integers.highest["block.conv1"] == most
        assert integers.highest["block.conv2"] <= most
        assert integers.given["stem.0"] > most, "nothing was clipped: this test cannot fail"
    assert integers.highest["stem.0"] > 127
    assert integers.highest["fc"] > 100


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("w2a2", marks=needs_every_integer),  # its first layer has 8 bits
        pytest.param("w4a4_lsq", marks=needs_every_integer),
        "lsq_plus",
    ],
)
def test_what_leaves_the_range_is_clipped_as_in_training_also_in_onnx_runtime(
    name: str, tmp_path: Path
) -> None:
    callback = fitted(tmp_path, name)
    fake_quant: Any = callback.networks["fake_quant"]
    step = fake_quant.fc.activation_post_process.scale.detach()
    onnx = onnxruntime.InferenceSession(
        to_onnx(callback.int8_model, bright()[:2]).SerializeToString()
    )
    with torch.no_grad():
        expected = fake_quant(bright())
        found = callback.int8_model(bright())
    assert ((expected - found).abs() / step).max() < 1.5
    assert ((expected - found).abs() / step).mean() < 0.05
    (logits,) = onnx.run(None, {"images": bright().numpy()})
    assert ((torch.from_numpy(logits) - found).abs() / step).max() < 1.5


def test_both_sides_of_a_sum_keep_8_bits(tmp_path: Path) -> None:
    net: Any = fitted(tmp_path, "w2a2").networks["fake_quant"]
    assert net.block.conv1.activation_post_process.limits == (0, 3)
    stem = net.get_submodule("stem.0")
    assert stem.activation_post_process.limits == (0, 3), "the next layer reads it, too"
    for module in (net.block.conv2, net.block.add, net.fc, net.quant_x):
        assert module.activation_post_process.limits == (0, 255)


def test_all_layers_can_have_the_same_bits(tmp_path: Path) -> None:
    qconfig = make_qconfig(weight_bits=4, activation_bits=4, wide_ends=False)
    net: Any = fitted(tmp_path, qconfig).networks["fake_quant"]
    for name in ("stem.0", "fc"):
        assert net.get_submodule(name).weight_fake_quant.quant_max == 7
    assert net.quant_x.activation_post_process.limits == (0, 15)


@needs_every_integer
def test_a_clamp_between_layers_does_not_hide_the_range(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip
    torch.manual_seed(0)
    callback = QuantizationAwareTraining("w4a4")
    trainer_with(callback, folder=tmp_path).fit(SmallModule(net), loader())
    fake_quant: Any = callback.networks["fake_quant"]
    step = fake_quant.get_submodule("5").activation_post_process.scale
    with torch.no_grad():
        difference = (fake_quant(bright()) - callback.int8_model(bright())).abs() / step
    assert difference.max() < 1.5


def test_torchs_own_fake_quantisers_may_have_few_bits_too(tmp_path: Path) -> None:
    activation = tq.FakeQuantize.with_args(quant_min=0, quant_max=15, dtype=torch.quint8)
    qconfig = tq.QConfig(activation, tq.default_per_channel_weight_fake_quant)
    callback = fitted(tmp_path, qconfig)
    net: Any = callback.networks["fake_quant"]
    with torch.no_grad():
        difference = (net(bright()) - callback.int8_model(bright())).abs()
    assert difference.max() < 1.5 * net.fc.activation_post_process.scale


def test_power_of_two_scales_are_powers_of_two(tmp_path: Path) -> None:
    net = fitted(tmp_path, "power_of_two").networks["fake_quant"]
    found: list[Any] = [m for m in net.modules() if isinstance(m, tq.FakeQuantizeBase)]
    scales = torch.cat([fake_quant.scale for fake_quant in found])
    assert len(scales) > 20
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))


def test_only_one_layer_is_quantised(tmp_path: Path) -> None:
    callback = PostTrainingQuantization("w4a4", only="block.conv2")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(SmallModule(), loader())
    layers = [name for name, m in callback.int8_model.named_modules() if hasattr(m, "_weight_bias")]
    assert layers == ["block.conv2"]
    with pytest.raises(ValueError, match=r"no layer 'block.conv3'.*block.conv2"):
        trainer_with(PostTrainingQuantization(only="block.conv3"), folder=tmp_path).fit(
            SmallModule(), loader()
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weight_bits": 0}, "weight_bits=0 is not permitted.*2 to 8"),
        ({"weight_bits": 9}, "weight_bits=9 is not permitted.*2 to 8"),
        ({"activation_bits": 1}, "activation_bits=1 is not permitted"),
        ({"activation_bits": 4.0}, "activation_bits=4.0 is not permitted"),
        ({"scales": "lerned"}, "scales='lerned' does not exist: choose observed, .*learned"),
        ({"observer": "mse"}, "observer='mse' does not exist"),
        ({"engine": "cudnn"}, "engine='cudnn' does not exist: choose x86"),
        ({"per_channel": "no"}, "per_channel='no' is not permitted"),
        ({"averaging_constant": 0}, "averaging_constant=0"),
        ({"averaging_constant": 2}, "averaging_constant=2"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_qconfig(**knobs)


def fake_quantize(**kwargs: Any) -> Any:
    return tq.FakeQuantize.with_args(**kwargs)


WEIGHT = tq.default_per_channel_weight_fake_quant
ACTIVATION = fake_quantize(quant_min=0, quant_max=127, dtype=torch.quint8)


@pytest.mark.parametrize(
    ("activation", "weight", "message"),
    [
        (fake_quantize(quant_min=0, quant_max=300), WEIGHT, "within the dtype: 0..255 for quint8"),
        (fake_quantize(quant_min=9, quant_max=3), WEIGHT, "cannot be made"),
        (fake_quantize(dtype=torch.qint8), WEIGHT, "activation .* is torch.qint8.*torch.quint8"),
        (ACTIVATION, fake_quantize(dtype=torch.quint8), "weight .* is torch.quint8.*torch.qint8"),
        (
            fake_quantize(observer=tq.PerChannelMinMaxObserver, dtype=torch.quint8,
                          qscheme=torch.per_channel_affine),
            WEIGHT,
            "torch.per_channel_affine, for which there is no integer kernel",
        ),
        (
            ACTIVATION,
            fake_quantize(observer=tq.PerChannelMinMaxObserver, dtype=torch.qint8, ch_axis=1,
                          qscheme=torch.per_channel_symmetric),
            "on axis 1, for which there is no integer kernel",
        ),
        (
            ACTIVATION,
            fake_quantize(observer=tq.PerChannelMinMaxObserver, dtype=torch.qint8,
                          qscheme=torch.per_channel_affine_float_qparams),
            "float_qparams on axis 0, for which there is no integer kernel",
        ),
    ],
)  # fmt: skip
def test_qconfigs_without_an_integer_kernel_are_refused(
    activation: Any, weight: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(tq.QConfig(activation, weight))


class SharesAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(192, 192) for _ in range(3))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.flatten(1)).relu())
        return self.third(x.relu())[:, :4]


@needs_every_integer
def test_layers_that_share_a_weight_round_it_to_bits_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = QuantizationAwareTraining("w2a4")
    trainer_with(callback, folder=tmp_path).fit(SmallModule(SharesAWeight()), loader())
    fake_quant: Any = callback.networks["fake_quant"]
    step = fake_quant.third.activation_post_process.scale
    assert fake_quant.first.weight is fake_quant.second.weight
    with torch.no_grad():
        difference = callback.int8_model(bright()) - fake_quant(bright())
    assert (difference.abs() / step).max() < 1.5


def test_few_bits_do_not_hide_8_that_would_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UserError, match="saturate"):
        QuantizationAwareTraining(make_qconfig(activation_bits=4, reduce_range=False))


@needs_every_integer
@pytest.mark.parametrize(("base", "own", "limits"), [("x86", "w4a4", 15), ("w4a4", "w2a2_lsq", 3)])
def test_the_bits_of_one_layer_are_those_of_what_it_takes_in(
    base: str, own: str, limits: int, tmp_path: Path
) -> None:
    callback = fitted(tmp_path, base, overrides={"block.conv2": own})
    net: Any = callback.networks["fake_quant"]
    assert net.block.conv1.activation_post_process.limits == (0, limits)
    x = bright()
    step = net.fc.activation_post_process.scale.detach()
    with torch.no_grad():
        assert ((net(x) - callback.int8_model(x)).abs() / step).max() < 1.5


class SharedLayer(nn.Module):
    """One layer, called twice, that two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.a, self.b, self.last = (nn.Conv2d(3, 3, 1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.conv(self.a(self.conv(self.first(x))))))


def test_where_readers_differ_the_first_decides_each_time() -> None:
    overrides: Any = {"a": QCONFIGS["w3a3"](), "b": QCONFIGS["w2a2"]()}
    nets: list[Any] = [
        prepare_qat(SharedLayer(), QCONFIGS["w4a4"](), "x86", overrides) for _ in range(10)
    ]
    assert {net.conv.activation_post_process.quant_max for net in nets} == {2**3 - 1}


def test_what_an_activation_function_takes_in_keeps_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip
    callback = QuantizationAwareTraining("w2a4_lsq")
    trainer_with(callback, folder=tmp_path).fit(SmallModule(net), loader())
    fake_quant: Any = callback.networks["fake_quant"]
    limits = [x.activation_post_process.limits for x in map(fake_quant.get_submodule, "012")]
    assert limits == [(0, 255), (0, 15), (0, 255)]
