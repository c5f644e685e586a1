"""The table of the noise that each layer adds."""

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import UserError, layer_damage
from lightning_qat.quantization.attach import detach, quantization_of
from lightning_qat.report.layers import write_layers_csv
from tests.deployment.artifacts import calibrated
from tests.quantization.networks import SmallNet, images

Rows = list[dict[str, Any]]


def row_of(rows: Rows, name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["name"] == name)
    return row


def decibels(expected: Tensor, found: Tensor) -> float:
    return 10 * math.log10(float(expected.pow(2).sum() / (found - expected).pow(2).sum()))


def first_output(net: Any, module: str, x: Tensor) -> Tensor:
    """Return the output of the first call of a submodule."""
    given: list[Tensor] = []
    handle = net.get_submodule(module).register_forward_hook(lambda *args: given.append(args[2]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return given[0]


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    return calibrated(SmallNet(), images()[0])


def test_every_integer_layer_has_a_row_under_its_name(net: Any) -> None:
    rows = layer_damage(net, images(count=70)[0])
    assert {row["name"]: row["kind"] for row in rows} == {
        "stem.0": "Conv2d + ReLU",
        "block.conv1": "Conv2d + ReLU",
        "block.conv2": "Conv2d",
        "block.add": "add + ReLU",
        "fc": "Linear",
    }
    assert rows == sorted(rows, key=lambda row: row["own_sqnr_db"])
    assert all(row["sqnr_db"] < row["own_sqnr_db"] + 1 for row in rows)


def test_figures_are_those_of_a_direct_computation(net: Any) -> None:
    x = images(count=70, seed=5)[0]  # more than one batch, and a smaller last one
    row = row_of(layer_damage(net, x), "block.conv1")
    in_float = detach(copy.deepcopy(net))
    expected = first_output(in_float, "block.relu", x)
    assert row["sqnr_db"] == pytest.approx(
        decibels(expected, first_output(net, "block.relu", x)), abs=0.01
    )
    assert row["sqnr_db"] < row["own_sqnr_db"] - 0.5
    block: Any = in_float.get_submodule("block")
    factor = block.bn1.weight / torch.sqrt(block.bn1.running_var + block.bn1.eps)
    folded = block.conv1.weight * factor[:, None, None, None]
    assert row["weight_min"] == pytest.approx(folded.min().item())
    assert row["weight_max"] == pytest.approx(folded.max().item())
    assert row["activation_min"] == 0
    assert row["activation_max"] == pytest.approx(expected.max().item())


def test_a_layer_alone_rounds_its_weight_and_its_output(net: Any) -> None:
    x = images(seed=5)[0]
    row = row_of(layer_damage(net, x), "block.conv1")
    in_float, quantization = detach(copy.deepcopy(net)), quantization_of(net)
    assert quantization is not None
    expected, before = (first_output(in_float, name, x) for name in ("block.relu", "stem.2"))
    with torch.no_grad():
        block: Any = in_float.get_submodule("block")
        weight = quantization.weight("block.conv1.weight")(block.conv1.weight)
        alone = torch.relu(block.bn1(F.conv2d(before, weight, padding=1)))
        alone = quantization.activation("block.conv1/conv2d.0:out")(alone)
    assert row["own_sqnr_db"] == pytest.approx(decibels(expected, alone), abs=0.01)


def test_clipping_is_counted_where_the_kernels_clip(net: Any) -> None:
    x = images()[0] * 3
    expected = first_output(detach(copy.deepcopy(net)), "stem.2", x)
    quantization = quantization_of(net)
    assert quantization is not None
    scale, _ = quantization.activation("stem.0/conv2d.0:out").qparams()
    beyond_127, beyond_255 = ((expected / scale > n).double().mean() for n in (127.5, 255.5))
    assert beyond_127 > 1.5 * beyond_255 > 0
    row = row_of(layer_damage(net, x), "stem.0")
    assert row["clipped"] == pytest.approx(beyond_255.item(), abs=1e-4)
    assert row_of(layer_damage(net, images()[0]), "stem.0")["clipped"] == 0


def test_the_network_stays_as_it_was(net: Any) -> None:
    x = images()[0]
    quantization = quantization_of(net.train())
    assert quantization is not None
    quantization.observe(True)
    before, scales = copy.deepcopy(net.state_dict()), quantization.scales()
    layer_damage(net, x * 3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, scales[name]) for name, value in quantization.scales().items())
    assert net.training
    assert quantization.activation("stem.0/conv2d.0:out").observes


def with_a_broken_weight(name: str) -> nn.Module:
    """Make one huge output channel that its ReLU removes. It takes the others' precision."""
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
    batch_norm: str, layer: str
) -> None:
    x, qconfig = images(seed=5)[0], "per_tensor_symmetric"
    before = layer_damage(calibrated(with_a_broken_weight(batch_norm), x, qconfig), x)
    worst, second, *_ = before
    assert worst["name"] == layer
    assert worst["weight_max"] > 100
    assert worst["own_sqnr_db"] < min(3, second["own_sqnr_db"] - 8)
    mended = calibrated(with_a_broken_weight(batch_norm), x, qconfig, {layer: None})
    after = layer_damage(mended, x)
    assert layer not in [row["name"] for row in after]
    assert row_of(after, "fc")["sqnr_db"] > row_of(before, "fc")["sqnr_db"] + 10


@pytest.mark.parametrize(
    ("name", "site"), [("block.conv2", "block.conv2/conv2d.0"), ("block.add", "block/add_.0")]
)
def test_a_scale_that_outliers_have_spoiled_is_the_worst(name: str, site: str, net: Any) -> None:
    quantization = quantization_of(net)
    assert quantization is not None
    quantizer = quantization.activation(f"{site}:out")
    quantizer.low.mul_(50)
    quantizer.high.mul_(50)
    worst, second, *_ = layer_damage(net, images(seed=5)[0])
    assert worst["name"] == name
    assert worst["own_sqnr_db"] < second["own_sqnr_db"] - 10


def test_a_layer_or_a_sum_in_float_has_no_row() -> None:
    net = calibrated(SmallNet(), images()[0], overrides={"block.add": None, "fc": None})
    names = {row["name"] for row in layer_damage(net, images()[0])}
    assert names == {"stem.0", "block.conv1", "block.conv2"}


@pytest.mark.parametrize(("clamp", "kind"), [(nn.ReLU6(), "ReLU6"), (nn.Hardtanh(), "Hardtanh")])
def test_a_layer_that_rounds_behind_its_clamp_is_judged_there(clamp: nn.Module, kind: str) -> None:
    x = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 3
    net = calibrated(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), clamp), x)
    row = row_of(layer_damage(net, x), "0")
    with torch.no_grad():
        expected = detach(copy.deepcopy(net))(x)
        assert row["sqnr_db"] == pytest.approx(decibels(expected, net(x)), abs=0.01)
    assert row["kind"] == f"Conv2d + {kind}"
    assert row["activation_max"] == expected.max()


class InPlace(nn.Module):
    """A network whose second use of a convolution's output changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = torch.sigmoid(y)
        return F.hardswish(self.last(self.relu(y) + z), inplace=True)


def test_layers_that_work_in_place_are_compared_before_they_do() -> None:
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    rows = layer_damage(calibrated(InPlace(), x), x)
    assert row_of(rows, "conv")["activation_min"] < -0.5
    assert all(row["sqnr_db"] > 25 for row in rows), rows


class Shared(nn.Module):
    """One convolution, called at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(torch.relu(self.conv(x))))


def test_a_layer_that_is_called_twice_has_one_row_over_both_calls() -> None:
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    net = calibrated(Shared(), x)
    row = row_of(layer_damage(net, x), "conv")
    plain = detach(copy.deepcopy(net))
    with torch.no_grad():
        first = torch.relu(plain.conv(x))  # type: ignore[operator]
        second = plain.conv(first)  # type: ignore[operator]
    assert row["activation_max"] == pytest.approx(max(first.max().item(), second.max().item()))
    assert row["activation_min"] == pytest.approx(second.min().item())


def test_a_dead_layer_has_no_ratio_and_comes_last_and_the_csv_says_so(tmp_path: Path) -> None:
    x = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    dead = nn.Conv2d(3, 4, 3)
    nn.init.constant_(dead.bias, -100)  # type: ignore[arg-type]
    rows = layer_damage(calibrated(nn.Sequential(nn.Conv2d(3, 3, 3), dead, nn.ReLU()), x), x)
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


def test_a_float_network_is_refused() -> None:
    with pytest.raises(UserError, match="trained or calibrated"):
        layer_damage(SmallNet(), images()[0])
