"""The table that says which layer to keep in float."""

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.ao.ns.fx.utils import compute_sqnr
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.damage import layer_damage
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import QCONFIGS, per_tensor_symmetric, x86
from lightning_qat.report.layers import write_layers_csv
from tests.quantization.networks import SmallModule, SmallNet, images, loader
from tests.quantization.test_callback import trainer_with
from tests.quantization.test_graph import SharedConvolution
from tests.quantization.test_layers import chain, trained

Rows = list[dict[str, Any]]


def calibrated(
    net: nn.Module, folder: Path, x: Tensor | None = None, **settings: Any
) -> PostTrainingQuantization:
    """The callback after one calibration of ``net``, whose batch-norm has seen the images."""
    data = loader()
    if x is not None:
        data = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)), len(x))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(next(iter(data))[0])
    callback = PostTrainingQuantization(allow_saturation=True, **settings)
    trainer_with(callback, folder=folder, max_epochs=1).fit(SmallModule(net), data)
    return callback


def table(callback: Any, x: Tensor) -> Rows:
    return layer_damage(callback.networks["fake_quant"], callback.int8_model, x)


def row_of(rows: Rows, name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["name"] == name)
    return row


@pytest.fixture
def fitted(tmp_path: Path) -> QuantizationAwareTraining:
    torch.manual_seed(0)
    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())
    return callback


def test_every_integer_layer_has_a_row_of_what_a_user_calls_it(
    fitted: QuantizationAwareTraining,
) -> None:
    rows = table(fitted, images(count=70)[0])
    assert {row["name"]: row["kind"] for row in rows} == {
        "quant_x": "quantise",
        "stem.0": "Conv2d + ReLU",
        "block.conv1": "Conv2d + ReLU",
        "block.conv2": "Conv2d",
        "block.add": "add + ReLU",
        "quant_flatten": "quantise",
        "fc": "Linear",
    }
    assert rows == sorted(rows, key=lambda row: row["own_sqnr_db"])
    assert all(row["sqnr_db"] < row["own_sqnr_db"] + 1 for row in rows)


def test_figures_are_those_of_a_direct_computation(fitted: QuantizationAwareTraining) -> None:
    x = images(count=70, seed=5)[0]  # more than one batch, the last of them smaller
    net: Any = copy.deepcopy(fitted.networks["fake_quant"]).apply(tq.disable_fake_quant)
    integers: Any = fitted.int8_model
    row = row_of(table(fitted, x), "block.conv1")
    given: dict[str, Any] = {}
    for name, network in (("float", net), ("int8", integers)):
        network.block.conv1.register_forward_hook(
            lambda _, args, output, name=name: given.update({name: (args[0], output)})
        )
    with torch.no_grad():
        net(x)
        integers(x)
        before, expected = given["float"]
        conv, bn = net.block.conv1, net.block.conv1.bn
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        weight = conv.weight * factor[:, None, None, None]
        alone = conv.apply(tq.enable_fake_quant)(before)
    scale = conv.activation_post_process.scale
    assert row["own_sqnr_db"] == pytest.approx(compute_sqnr(expected, alone).item(), abs=0.01)
    in_int8 = compute_sqnr(expected, given["int8"][1].dequantize()).item()
    assert row["sqnr_db"] == pytest.approx(in_int8, abs=0.01)
    assert row["sqnr_db"] < row["own_sqnr_db"] - 0.5
    assert row["weight_min"] == pytest.approx(weight.min().item())
    assert row["weight_max"] == pytest.approx(weight.max().item())
    assert row["activation_min"] == 0
    assert row["activation_max"] == pytest.approx(expected.max().item())
    assert row["clipped"] == (expected > 255.5 * scale).double().mean().item() == 0


def test_clipping_is_counted_where_the_kernels_clip(fitted: QuantizationAwareTraining) -> None:
    x = images()[0] * 3
    stub: Any = fitted.networks["fake_quant"].get_submodule("quant_x").activation_post_process
    beyond_127, beyond_255 = ((x / stub.scale > n).double().mean().item() for n in (127.5, 255.5))
    assert beyond_127 > 1.5 * beyond_255 > 0
    row = row_of(table(fitted, x), "quant_x")
    assert row["clipped"] == pytest.approx(beyond_255, abs=1e-4)
    assert row_of(table(fitted, images()[0]), "quant_x")["clipped"] == 0
    assert row["own_sqnr_db"] < row_of(table(fitted, images()[0]), "quant_x")["own_sqnr_db"] - 10


def test_both_networks_stay_as_they_were(fitted: QuantizationAwareTraining) -> None:
    x = images()[0]
    net, model = fitted.networks["fake_quant"], fitted.int8_model
    net.get_submodule("fc").apply(tq.enable_observer)
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for network in (net, model) for module in network.modules()]
    output = model(x)
    layer_damage(net, model, x * 3)
    assert torch.equal(model(x), output)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert modes == [module.training for network in (net, model) for module in network.modules()]


def with_a_broken_weight(name: str) -> nn.Module:
    """One huge output channel that its ReLU cuts off: it leaves the others no integers."""
    torch.manual_seed(0)
    net = SmallNet()
    batch_norm = net.get_submodule(name)
    with torch.no_grad():
        batch_norm.weight[3], batch_norm.bias[3] = 1e4, -1e6  # type: ignore[operator, index]
    return net


@pytest.mark.parametrize(
    ("batch_norm", "layer"), [("stem.1", "stem.0"), ("block.bn1", "block.conv1")]
)
def test_a_broken_layer_is_the_worst_and_one_override_away_from_float(
    batch_norm: str, layer: str, tmp_path: Path
) -> None:
    x, qconfig = images(seed=5)[0], "per_tensor_symmetric"
    before = calibrated(with_a_broken_weight(batch_norm), tmp_path, qconfig=qconfig)
    worst, second, *_ = table(before, x)
    assert worst["name"] == layer
    assert worst["weight_max"] > 100
    assert worst["own_sqnr_db"] < min(3, second["own_sqnr_db"] - 8)
    broken, overrides = with_a_broken_weight(batch_norm), {worst["name"]: None}
    after = calibrated(broken, tmp_path, qconfig=qconfig, overrides=overrides)
    rows = table(after, x)
    assert layer not in [row["name"] for row in rows]
    assert row_of(rows, "fc")["sqnr_db"] > row_of(table(before, x), "fc")["sqnr_db"] + 10
    assert after.int8_model(x).shape == (64, 4)


@pytest.mark.parametrize("name", ["block.conv2", "block.add"])
def test_a_scale_that_outliers_have_spoilt_is_the_worst(
    name: str, fitted: QuantizationAwareTraining
) -> None:
    net: Any = copy.deepcopy(fitted.networks["fake_quant"])
    net.get_submodule(name).activation_post_process.scale.mul_(50)
    worst, second, *_ = layer_damage(net, convert(net, "x86"), images(seed=5)[0])
    assert worst["name"] == name
    assert worst["own_sqnr_db"] < second["own_sqnr_db"] - 10


def test_a_sum_is_kept_in_float_by_the_name_of_its_row(tmp_path: Path) -> None:
    callback = calibrated(SmallNet(), tmp_path, overrides={"block.add": None})
    assert not any(isinstance(m, nnq.QFunctional) for m in callback.int8_model.modules())
    assert "block.add" not in [row["name"] for row in table(callback, images()[0])]


@pytest.mark.parametrize("qconfig", [*QCONFIGS][:7])
def test_each_qconfig_gives_what_its_bits_promise(qconfig: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = table(calibrated(SmallNet(), tmp_path, qconfig=qconfig), images(seed=5)[0])
    assert len(rows) == 7
    quantise = row_of(rows, "quant_x")["own_sqnr_db"]
    # one of its bits more is 6 dB; a zero point in the middle wastes one on positive images
    promised = {"onednn": 52, "qnnpack": 52}.get(qconfig, 40 if "symmetric" in qconfig else 46)
    assert quantise == pytest.approx(promised, abs=1)
    assert all(25 < row["own_sqnr_db"] < 58 for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("mobilenet_v3_small", {"Conv2d", "Hardswish", "Hardsigmoid", "mul", "add"}),
        ("densenet121", {"Conv2d", "cat", "BatchNorm2d + ReLU"}),
        ("googlenet", {"cat"}),
        ("shufflenet_v2_x0_5", {"Conv2d", "cat"}),
        ("mobilenet_v2", {"Conv2d", "Conv2d + ReLU6", "add"}),
    ],
)
def test_torchvisions_networks_have_a_row_for_each_integer_module(
    name: str, kinds: set[str], tmp_path: Path
) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None, num_classes=10)

    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    callback = calibrated(net(), tmp_path, x)
    rows = table(callback, x)
    integer = (nnq.Conv2d, nnq.Linear, nnq.BatchNorm2d, nnq.QFunctional, nnq.Quantize,
               nnq.Hardswish, nn.Hardsigmoid)  # fmt: skip
    modules = [m for m in callback.int8_model.modules() if isinstance(m, integer)]
    assert len(rows) == len(modules)
    common = {"quantise", "Conv2d + ReLU", "Linear"}
    assert {row["kind"] for row in rows} - common == kinds
    assert not {row["name"] for row in rows} & set(callback.in_float)
    # an override that names nothing, or changes nothing, is refused
    names = [row["name"] for row in rows if row["kind"] != "quantise"]
    prepare_qat(net(), x86(), "x86", dict.fromkeys(names, per_tensor_symmetric()))


@pytest.mark.parametrize("clamp", [nn.ReLU6, lambda: nn.Hardtanh(-0.31, 0.57)])
def test_a_layer_that_rounds_behind_its_clamp_is_judged_there(
    clamp: Callable[[], nn.Module],
) -> None:
    x = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 3
    net: Any = trained(chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), clamp()), x)
    model = convert(net, "x86")
    row = row_of(layer_damage(net, model, x), "0")
    with torch.no_grad():
        expected = net.apply(tq.disable_fake_quant)(x)
        (stub,) = (m for m in net.modules() if isinstance(m, tq.QuantStub))
        net.apply(tq.enable_fake_quant)
        stub.apply(tq.disable_fake_quant)
        alone = net(x)
        assert row["sqnr_db"] == pytest.approx(compute_sqnr(expected, model(x)).item(), abs=0.01)
    assert row["own_sqnr_db"] == pytest.approx(compute_sqnr(expected, alone).item(), abs=0.01)
    assert row["kind"] == f"Conv2d + {type(clamp()).__name__}"
    assert row["activation_max"] == expected.max()


class InPlace(nn.Module):
    """The second reader of a convolution overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = torch.sigmoid(y)
        return self.act(self.relu(y) + z)


def test_layers_that_work_in_place_are_compared_with_what_came_in() -> None:
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    net = trained(InPlace(), x)
    rows = layer_damage(net, convert(net, "x86"), x)
    assert row_of(rows, "conv")["activation_min"] < -0.5
    assert all(row["sqnr_db"] > 25 for row in rows), rows
    assert row_of(rows, "act")["own_sqnr_db"] > row_of(rows, "act")["sqnr_db"]


def test_a_layer_that_is_called_twice_has_one_row_over_both_calls() -> None:
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    net: Any = trained(SharedConvolution(), x)
    row = row_of(layer_damage(net, convert(net, "x86"), x), "conv")
    highest: list[float] = []
    net.conv.register_forward_hook(lambda _, args, y: highest.append(y.max().item()))
    with torch.no_grad():
        net.apply(tq.disable_fake_quant)(x)
    assert len(set(highest)) == 2
    assert row["activation_max"] == pytest.approx(max(highest))


def test_a_dead_layer_has_no_ratio_and_comes_last_and_the_csv_says_so(tmp_path: Path) -> None:
    x = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    dead = nn.Conv2d(3, 4, 3)
    nn.init.constant_(dead.bias, -100)  # type: ignore[arg-type]
    net = trained(chain(nn.Conv2d(3, 3, 3), dead, nn.ReLU()), x)
    rows = layer_damage(net, convert(net, "x86"), x)
    assert [row["name"] for row in rows][-1] == "1"
    assert rows[-1]["own_sqnr_db"] is rows[-1]["sqnr_db"] is None
    write_layers_csv(rows, tmp_path)
    with (tmp_path / "layers.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    columns = "name kind sqnr_db own_sqnr_db weight_min weight_max activation_min activation_max"
    assert list(written[0]) == [*columns.split(), "clipped"]
    assert [row["name"] for row in written] == [row["name"] for row in rows]
    assert float(written[0]["own_sqnr_db"]) == rows[0]["own_sqnr_db"]
    assert written[-1]["own_sqnr_db"] == ""
