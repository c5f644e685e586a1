"""torch's integer kernels give the same results as their lowered graph."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq

from lightning_qat.errors import UserError
from lightning_qat.quantization import ops  # noqa: F401 (registers the operators)
from lightning_qat.quantization.qconfig import QConfig
from lightning_qat.quantization.torch_ao import FloatOutputLinear, from_torch_qconfig
from lightning_qat.quantization.torch_kernels import to_torch_kernels
from lightning_qat.quantization.torch_layers import FloatLayer
from lightning_qat.quantization.torch_model import Int8Model, quantized_engine, torch_script

Q: Any = torch.ops.lightning_qat
ENGINES = ["x86", "fbgemm", "onednn", "qnnpack"]
QUANTIZE = torch._make_per_tensor_quantized_tensor
STEP = (0.05, 60)  # step of inputs in -3..3: integers in 0..127, which saturate on no CPU


def rounded(x: Tensor, scale: float, zero_point: int, *limits: Any) -> Tensor:
    integers = Q.quantize(x, scale, zero_point, *(limits or (0, 255, False)))
    return Q.dequantize(integers, scale, zero_point)


class Lowered(nn.Module):
    """A layer with integers in and out, in the form of `lower`."""

    def __init__(self, layer: Any, name: str = "block.layer", one_scale: bool = False) -> None:
        super().__init__()
        self.layer, self.name = [layer], name
        self.axis = int("Transpose" in type(layer).__name__)
        weight = layer.weight.detach()
        scale = weight.abs().amax([i for i in range(weight.ndim) if i != self.axis]) / 127
        scale = scale.amax().expand_as(scale).clone() if one_scale else scale
        shape = [-1 if i == self.axis else 1 for i in range(weight.ndim)]
        self.weight = nn.Buffer(torch.round(weight / scale.reshape(shape)).to(torch.int8))
        self.scale = nn.Buffer(scale)
        step = (scale.amax() if layer.bias.numel() != scale.numel() else scale) * STEP[0]
        self.bias = nn.Buffer(torch.round(layer.bias.detach() / step).int())
        self.bias_scale = nn.Buffer(step.expand_as(layer.bias).clone())

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        weight = Q.dequantize_per_channel(self.weight, self.scale, self.axis, self.name)
        bias = Q.dequantize_per_channel(self.bias, self.bias_scale, 0, self.name)
        state = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, state, (x,))


class Net(nn.Module):
    """A network that rounds its input, calls `then`, and rounds the output by `step`, if any."""

    def __init__(self, then: Any, step: Any = (0.05, 40), limits: Any = (0, 255, False)) -> None:
        super().__init__()
        self.then, self.step, self.limits = then, step, limits

    def forward(self, x: Tensor) -> Tensor:
        y = self.then(rounded(x, *STEP))
        return y if self.step is None else rounded(y, *self.step, *self.limits)


def lowered(net: nn.Module, *args: Any, dynamic: bool = False) -> Any:
    shapes = [{0: torch.export.Dim.AUTO}] if dynamic else None
    with torch.no_grad():
        exported = torch.export.export(net, args, dynamic_shapes=shapes, strict=False)
    return exported.module(check_guards=False)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)


def check(net: Net, x: Tensor, engine: str = "x86", copies: bool = True) -> Int8Model:
    """Compare the INT8 model of `net` with its lowered graph and with its copies."""
    graph = lowered(net, x)
    model = to_torch_kernels(graph, engine)
    expected, found = graph(x), model(x)
    steps = (found - expected).abs() / (net.step[0] if net.step else 1)
    assert steps.max() < (1.01 if net.step else 1e-4)
    assert (steps < 1e-3).double().mean() > 0.99
    assert model.engine == engine
    if copies:
        for other in (copy.deepcopy(model), torch_script(model)):
            with quantized_engine(engine):  # a script does not set it
                assert torch.equal(other(x), found)
    return model


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Any]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 20), nnq.Conv1d),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), nnq.Conv2d),
    "conv2d of groups": (nn.Conv2d(4, 6, (3, 1), groups=2), (2, 4, 9, 9), nnq.Conv2d),
    "conv2d depthwise": (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9), nnq.Conv2d),
    "conv2d dilated": (nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9), nnq.Conv2d),
    "conv2d same": (nn.Conv2d(4, 6, (3, 4), padding="same"), (2, 4, 9, 9), nnq.Conv2d),
    "conv2d valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 9), nnq.Conv2d),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5), nnq.Conv3d),
    "linear": (nn.Linear(20, 6), (2, 20), nnq.Linear),
    "linear of three dimensions": (nn.Linear(20, 6), (2, 3, 20), nnq.Linear),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_integers_of_the_lowered_graph(name: str, engine: str) -> None:
    layer, shape, kind = LAYERS[name]
    for relu in (False, True):
        then = Lowered(layer)
        net = Net(nn.Sequential(then, nn.ReLU(inplace=True)) if relu else then)
        model = check(net, image(*shape), engine)
        module: Any = model.get_submodule("block.layer")
        if engine == "qnnpack" and kind is nnq.Conv3d:
            assert "three dimensions" in model.meta["in_float"]["block.layer"]
        else:
            assert isinstance(module, kind)
            assert ("ReLU" in type(module).__name__) == relu
        assert torch.equal(module.weight().int_repr(), then.weight)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("layer", "shape", "reasons"),
    [
        (nn.ConvTranspose1d(4, 4, 3, 2), (2, 4, 9), {}),
        (nn.ConvTranspose2d(4, 4, 3, 2, 1), (2, 4, 9, 9), {}),
        (nn.ConvTranspose3d(4, 4, 3), (2, 4, 5, 5, 5), {"qnnpack": "three dimensions"}),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 9, 9), dict.fromkeys(ENGINES[:3], "unlike numbers")),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), (2, 4, 9, 9), dict.fromkeys(ENGINES[:3], "groups")),
        (nn.ConvTranspose2d(4, 4, 2, 2), (2, 4, 9, 9), {"fbgemm": "2 x 2"}),
        (
            nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1),
            (2, 4, 9, 9),
            {"fbgemm": "2 x 2", "x86": "2 x 2", "onednn": "output padding"},
        ),
        (nn.ConvTranspose2d(4, 4, 1, 2), (2, 4, 9, 9), {"onednn": "stride"}),
    ],
)
def test_transposed_convolutions_are_integers_or_in_float_for_a_reason(
    layer: nn.Module, shape: tuple[int, ...], reasons: dict[str, str], engine: str
) -> None:
    then = Lowered(layer, one_scale=True)
    model = check(Net(nn.Sequential(then, nn.ReLU())), image(*shape), engine)
    module: Any = model.get_submodule("block.layer")
    assert isinstance(module, FloatLayer) == (engine in reasons)
    assert reasons.get(engine, "") in model.meta["in_float"].get("block.layer", "")
    assert torch.equal(module.weight().int_repr(), then.weight)


def test_transposed_convolutions_with_a_scale_for_each_channel_are_in_float_on_x86() -> None:
    layer = nn.ConvTranspose2d(4, 4, 3)
    assert "scale for each" in str(check(Net(Lowered(layer)), image(2, 4, 9, 9)).meta["in_float"])
    assert not check(Net(Lowered(layer)), image(2, 4, 9, 9), "qnnpack").meta["in_float"]


@pytest.mark.parametrize(
    ("engine", "is_float"), [("x86", True), ("onednn", True), ("fbgemm", False)]
)
def test_onednn_is_not_used_where_it_reads_foreign_memory(engine: str, is_float: bool) -> None:
    layer = nn.Conv2d(4, 4, (1, 3), padding=(1, 0))
    model = check(Net(Lowered(layer)), image(2, 4, 9, 9), engine)
    assert isinstance(model.get_submodule("block.layer"), FloatLayer) == is_float


@pytest.mark.parametrize("engine", ENGINES)
def test_the_last_layer_gives_floats_and_holds_integers(engine: str) -> None:
    model = check(Net(Lowered(nn.Linear(500, 300)), step=None), image(2, 500), engine)
    has_kernel = engine in ("x86", "fbgemm")
    module: Any = model.get_submodule("block.layer")
    assert isinstance(module, FloatOutputLinear if has_kernel else FloatLayer)
    assert ("block.layer" in model.meta["in_float"]) == (not has_kernel)
    assert len(torch_script(model).save_to_buffer()) < 500 * 300 * 1.1
    model = check(Net(Lowered(nn.Conv2d(4, 4, 3)), step=None), image(2, 4, 9, 9), engine)
    assert model.meta["in_float"] == {"block.layer": "its output is not quantized"}


class Residual(nn.Module):
    """Sums, pools, shapes and a split between two layers."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = (
            Lowered(nn.Conv2d(4, 4, 3, padding=1), "a"),
            Lowered(nn.Conv2d(4, 4, 1), "b"),
        )
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = rounded(torch.relu(self.first(x)), 0.03, 20)
        if self.in_place:
            y += x
        else:
            y = y + x
        y = rounded(torch.relu(y), *STEP)
        y = torch.nn.functional.max_pool2d(y, 3, 2, 1)
        first, second = y.chunk(2, 1)
        y = torch.cat([rounded(second, *STEP), rounded(first, *STEP)], 1)
        y = torch.nn.functional.pad(y.permute(0, 1, 3, 2).contiguous(), (1, 1, 1, 1))
        return self.second(rounded(y, *STEP))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_place", [False, True])
def test_between_two_layers_values_stay_integers(in_place: bool, engine: str) -> None:
    model = check(Net(Residual(in_place)), image(2, 4, 9, 9), engine)
    targets = [node.target for node in model.graph.nodes]
    assert torch.ops.quantized.add_relu in targets
    assert (
        targets.count(torch._make_per_tensor_quantized_tensor) == targets.count("dequantize") == 1
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "limits", [(-128, 127, True), (-127, 127, True), (0, 15, False), (-8, 7, True)]
)
def test_signed_and_few_bits_end_where_the_lowered_graph_ends(limits: Any, engine: str) -> None:
    step = (2.9 / (limits[1] - limits[0]), 0)
    x = image(2, 4, 9, 9)
    check(Net(Lowered(nn.Conv2d(4, 6, 3)), step, limits), x, engine)
    reached = torch.round(check(Net(nn.Identity(), step, limits), x, engine)(x) / step[0])
    assert (reached.min(), reached.max()) == limits[:2]
    signed = nn.Sequential(
        Net(nn.Identity(), (STEP[0], 0), (-128, 127, True)), Lowered(nn.Conv2d(4, 6, 3))
    )
    check(Net(signed), x.clamp(-3, 0), engine)  # shifted by 128: above 0, pairs may saturate


@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(-0.31, 0.57), nn.Hardswish()])
@pytest.mark.parametrize("engine", ENGINES)
def test_clamps_follow_the_kernel(clamp: nn.Module, engine: str) -> None:
    inner = (
        Net(Lowered(nn.Conv2d(4, 6, 3)), STEP)
        if isinstance(clamp, nn.Hardswish)
        else Lowered(nn.Conv2d(4, 6, 3))
    )
    layers = nn.Sequential(inner, clamp)
    model = check(Net(layers), image(2, 4, 9, 9), engine)
    targets = [node.target for node in model.graph.nodes]
    assert (
        targets.count(torch._make_per_tensor_quantized_tensor) == targets.count("dequantize") == 1
    )


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Lowered(nn.Linear(36, 5), "fc")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(rounded(x.reshape(x.shape[0] * 4, 36), *STEP)).view(x.size(0), 4, 5)


def test_a_dynamic_batch_stays_dynamic_in_torchscript() -> None:
    graph = lowered(Net(Shapes(), None), image(3, 4, 6, 6), dynamic=True)
    model = to_torch_kernels(graph, "x86")
    for form in (
        model,
        torch_script(model),
        copy.deepcopy(model),
    ):
        for batch in (1, 3, 7, 0):
            x = image(batch, 4, 6, 6)
            torch.testing.assert_close(form(x), graph(x), atol=1e-4, rtol=1e-4)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Lowered(nn.Linear(8, 8), "graph")

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        x = inputs["x"].clone()
        x[:, 0] = inputs["y"]
        x.mul_(0.5)
        y = rounded(self.first(rounded(x, *STEP)), *STEP)
        y = rounded(self.first(y), *STEP)
        return {"y": y, "both": (x, self.first(y))}


def test_nested_inputs_writes_in_place_and_layers_that_are_called_again() -> None:
    inputs = ({"x": image(4, 8), "y": image(4)},)
    graph = lowered(Nested(), *inputs)
    model = to_torch_kernels(graph, "x86")
    for form in (model, copy.deepcopy(model)):
        torch.testing.assert_close(form(*inputs), graph(*inputs))
    assert sum(isinstance(module, nnq.Linear) for module in model.modules()) == 2
    assert isinstance(model.get_submodule("layer_graph"), nnq.Linear)


def test_a_model_sets_its_engine_and_stays_on_the_cpu() -> None:
    model = check(Net(Lowered(nn.Conv2d(4, 4, 3))), image(2, 4, 9, 9), "qnnpack")
    traced = torch.jit.trace(model, image(2, 4, 9, 9))
    assert torch.equal(traced(image(2, 4, 9, 9)), model(image(2, 4, 9, 9)))
    with pytest.raises(UserError, match="cannot go to meta"):
        model.to("meta")
    assert len(io.BytesIO(torch_script(model).save_to_buffer()).getvalue())


def test_a_qconfig_of_torch_is_translated_or_refused() -> None:
    found = from_torch_qconfig(tq.get_default_qat_qconfig("x86"))
    expected = QConfig("x86", activation_bits=7, reduce_range=False, wide_ends=False)
    assert found == expected
    weight = tq.default_weight_fake_quant
    refused = {
        "does not fake-quantize": tq.get_default_qconfig("x86"),
        "take torch.quint8": tq.QConfig(weight, weight),
        "on axis 1": tq.QConfig(
            tq.default_fake_quant, tq.default_per_channel_weight_fake_quant.with_args(ch_axis=1)
        ),
        "has no counterpart": tq.QConfig(tq.default_fixed_qparams_range_0to1_fake_quant, weight),
    }
    for words, qconfig in refused.items():
        with pytest.raises(UserError, match=words):
            from_torch_qconfig(qconfig)
