"""ONNX files of small lowered networks in ONNX Runtime, with all its optimizations."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.exported import export_program
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.onnx_export import export_onnx
from lightning_qat.quantization.onnx_names import input_names, output_names
from tests.quantization.training import trained

Q = torch.ops.lightning_qat


def quantized(x: Tensor, scale: float, zero_point: int = 0, high: int = 255) -> Tensor:
    integers = Q.quantize.default(x, scale, zero_point, 0, high, False)
    return Q.dequantize.default(integers, scale, zero_point)


class Layer(nn.Module):
    """A layer with integer weights and bias. A function takes their dequantized values.

    All scales are powers of two, so floats give exactly the results of integers.
    """

    def __init__(self, *shape: int, x_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / shape[1])
        self.bias = nn.Parameter(torch.randn(shape[0]))
        self.x_scale = x_scale

    def forward(self, function: Any, x: Tensor, **settings: Any) -> Tensor:
        largest = self.weight.abs().amax(list(range(1, self.weight.ndim)))
        scale = torch.exp2(torch.ceil(torch.log2(largest / 127)))
        column = scale.reshape([-1] + [1] * (self.weight.ndim - 1))
        weight = torch.round(self.weight / column).to(torch.int8)
        bias = torch.round(self.bias / (scale * self.x_scale)).to(torch.int32)
        weight = Q.dequantize_per_channel.default(weight, scale, 0, "layer")
        bias = Q.dequantize_per_channel.default(bias, scale * self.x_scale, 0, "layer")
        return function(x, weight, bias, **settings)


class Network(nn.Module):
    """A padded convolution with few bits, a residual sum, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Layer(8, 3, 3, 3, x_scale=2**-6)
        self.branch = Layer(8, 8, 3, 3, x_scale=2**-3)
        self.linear = Layer(5, 8, x_scale=2**-3)

    def forward(self, images: Tensor) -> Tensor:
        padded = quantized(F.pad(quantized(images, 2**-6, 3), (0, 1, 0, 1)), 2**-6, 3)
        x = quantized(F.relu(self.stem(F.conv2d, padded, stride=2)), 2**-3, high=15)
        y = quantized(self.branch(F.conv2d, x, padding=1), 2**-4, 120)
        x = quantized(F.relu(x + y), 2**-3)
        return self.linear(F.linear, quantized(x.amax((2, 3)), 2**-3))


def session(proto: onnx.ModelProto, path: Any = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # CPUs without VNNI
    if path is not None:
        options.optimized_model_filepath = str(path)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def to_onnx(network: nn.Module, *args: Any, dynamic: Any = "batch", **kwargs: Any) -> Any:
    program = export_program(network, args, kwargs, dynamic)
    with torch.no_grad():
        outputs = output_names(network(*args, **kwargs))
    return export_onnx(program, input_names(network.forward, args, kwargs), outputs)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(4, 3, 16, 16) * 2


def test_integer_layers_give_the_lowered_networks_numbers(images: Tensor, tmp_path: Any) -> None:
    network = Network().eval()
    proto = to_onnx(network, images[:1])
    result = session(proto, tmp_path / "optimized.onnx").run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        expected = export_program(network, (images,), {}).module()(images)
    np.testing.assert_array_equal(result, expected)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert {"QLinearAdd", "QGemm"} <= set(kinds)
    assert not {"Conv", "Gemm", "MatMul", "Add", "Pad"} & set(kinds)


def test_few_bits_are_a_clip_of_integers(images: Tensor) -> None:
    proto = to_onnx(Network().eval(), images)
    clips = [node for node in proto.graph.node if node.op_type == "Clip"]
    limits = {x.name: onnx.numpy_helper.to_array(x) for x in proto.graph.initializer}
    assert [[int(limits[name]) for name in clip.input[1:]] for clip in clips] == [[0, 15]]


def test_a_pad_moves_into_the_convolution(images: Tensor) -> None:
    proto = to_onnx(Network().eval(), images)
    assert "Pad" not in {node.op_type for node in proto.graph.node}
    convolution = next(node for node in proto.graph.node if node.op_type == "Conv")
    pads = next(list(x.ints) for x in convolution.attribute if x.name == "pads")
    assert pads == [0, 0, 1, 1]


def test_another_size_is_free_on_request(images: Tensor) -> None:
    network = Network().eval()
    larger = torch.rand(3, 3, 24, 20)
    proto = to_onnx(network, images, dynamic="size")
    result = session(proto).run(None, {"images": larger.numpy()})[0]
    with torch.no_grad():
        expected = export_program(network, (larger,), {}).module()(larger)
    np.testing.assert_array_equal(result, expected)
    sizes = [x.dim_param or x.dim_value for x in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]


def test_weights_that_meet_only_padding_are_cropped(images: Tensor) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(4, 3, 3, 3, x_scale=2**-6)

        def forward(self, x: Tensor) -> Tensor:
            return quantized(self.layer(F.conv2d, quantized(x, 2**-6), padding=1), 2**-3, 128)

    network, x = Small().eval(), images[:, :, :1, :1]
    proto = to_onnx(network, x)
    assert [1, 1] in [list(weight.dims)[2:] for weight in proto.graph.initializer]
    with torch.no_grad():
        np.testing.assert_array_equal(session(proto).run(None, {"x": x.numpy()})[0], network(x))


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, Tensor]
    loss: Tensor | None = None


torch.export.register_dataclass(Output)


class Nested(nn.Module):
    def forward(self, left: Tensor, maps: dict[str, Tensor], *, pair: list[Tensor]) -> Output:
        x = quantized(left + maps["a"], 0.1)
        return Output(x * pair[0], (x - pair[1], maps["b"] + 1))


def test_nested_inputs_and_outputs_have_names() -> None:
    a, b, c, d, e = torch.rand(5, 2, 3)
    args, kwargs = (a, {"a": b, "b": c}), {"pair": [d, e]}
    proto = to_onnx(Nested(), *args, **kwargs)
    names = [x.name for x in proto.graph.input]
    assert names == ["left", "maps_a", "maps_b", "pair_0", "pair_1"]
    assert [x.name for x in proto.graph.output] == ["logits", "hidden_0", "hidden_1"]
    batch = {x.type.tensor_type.shape.dim[0].dim_param for x in proto.graph.input}
    assert batch == {"batch"}
    feed = dict(zip(names, (x.numpy() for x in (a, b, c, d, e)), strict=True))
    logits, *hidden = session(proto).run(None, feed)
    expected = Nested()(*args, **kwargs)
    np.testing.assert_array_equal(logits, expected.logits)
    for result, wanted in zip(hidden, expected.hidden, strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_a_fixed_batch_is_announced(images: Tensor) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, -1) if x.shape[0] == 4 else x.reshape(1, -1)

    with pytest.warns(UserWarning, match="only the batch size of the example"):
        proto = to_onnx(Fixed(), images)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_constants_that_the_input_is_written_into_stay(images: Tensor) -> None:
    class Writes(nn.Module):
        start: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("start", torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            canvas = torch.zeros(16) + self.start
            canvas[2:4] = x[0, 0, 0, 2:4]
            return x + canvas

    network = Writes()
    proto = to_onnx(network, images)
    result = session(proto).run(None, {"x": images.numpy()})[0]
    np.testing.assert_array_equal(result, network(images))
    assert network.start.eq(1).all()


def test_nothing_is_printed_and_no_path_is_in_the_file(images: Tensor, capfd: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = to_onnx(Network().eval(), images).SerializeToString()
    assert capfd.readouterr() == ("", "")
    assert not [part for part in (b".py", b"stack_trace", b"pkg.torch") if part in text]


def test_missing_packages_are_named(images: Tensor, monkeypatch: Any) -> None:
    program = export_program(Network().eval(), (images,), {})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-qat\[onnx\]'"):
        export_onnx(program, ["images"], ["logits"])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "added"),
    [(2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 2, 1, 0), (5, 3, 0, 2), (1, 2, 0, 0)],
)
def test_a_transposed_convolution_runs_in_integers(
    kernel: int, stride: int, padding: int, added: int, tmp_path: Path
) -> None:
    up = nn.ConvTranspose2d(6, 5, kernel, stride, padding, added)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), up, nn.ReLU(), nn.Conv2d(5, 4, 1))
    x = torch.randn(2, 3, 8, 7)
    trained(net, x)
    proto = export_onnx(lower(net, (x,)), ["x"], ["y"])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("QLinearConv") == 3
    assert not {"Conv", "ConvTranspose"} & {*nodes}
    with torch.no_grad():
        expected = net(torch.cat([x, x]))
    (found,) = session.run(None, {"x": torch.cat([x, x]).numpy()})
    assert np.array_equal(found, expected.numpy())
