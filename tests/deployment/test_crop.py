"""Cropped kernels have fewer weights and give the same numbers."""

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.quantization.onnx_passes import optimize


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]


def convolution(
    size: int, taps: int, pads: list[int], stride: int, dilation: int
) -> onnx.ModelProto:
    """Return quantized weights, 2 -> 3 channels, on maps of size x (size + 1)."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (3, 2, taps, taps)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weight"], axis=0),
        helper.make_node(
            "Conv", ["x", "weight"], ["y"], kernel_shape=[taps, taps], pads=pads,
            strides=[stride, stride], dilations=[dilation, dilation]),
    ]  # fmt: skip
    shape: list[Any] = ["batch", 2, size, size + 1]
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, None, None])],
        [numpy_helper.from_array(weight, "w"),
         numpy_helper.from_array(np.array([0.1, 0.2, 0.3], np.float32), "scale"),
         numpy_helper.from_array(np.zeros(3, np.int8), "zero")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_every_small_convolution_computes_what_it_did() -> None:
    cropped = 0
    for size, taps, before, after, stride, dilation in itertools.product(
        (1, 2, 3, 5), (1, 3, 4, 7), (0, 1, 3), (0, 1, 2, 3), (1, 2, 3), (1, 2, 3)
    ):
        if size + before + after < dilation * (taps - 1) + 1:
            continue  # no output at all
        proto = convolution(size, taps, [before, before, after, after], stride, dilation)
        x = np.random.default_rng(1).random((2, 2, size, size + 1), np.float32)
        expected, bytes_before = run(proto, x), proto.ByteSize()
        optimize(proto)
        onnx.checker.check_model(proto, full_check=True)
        found = run(proto, x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        cropped += proto.ByteSize() < bytes_before
    assert cropped > 100


@pytest.mark.parametrize(("size", "left"), [(1, 1), (2, 3), (8, 3)])
def test_a_3x3_kernel_keeps_what_meets_the_map(size: int, left: int) -> None:
    proto = convolution(size, 3, [1, 1, 1, 1], 1, 1)
    optimize(proto)
    assert proto.graph.initializer[0].dims[2] == left
    assert proto.graph.initializer[0].dims[3] == 3  # one more column than rows


def test_a_map_of_unknown_size_is_left_alone() -> None:
    weight = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    odd = helper.make_node("Unknown", ["image"], ["x"], domain="somebody's")
    image, y = (helper.make_tensor_value_info(name, 1, None) for name in ("image", "y"))
    graph = helper.make_graph([odd, node], "net", [image], [y], [weight])
    known = [helper.make_opsetid("", 20), helper.make_opsetid("somebody's", 1)]
    proto = helper.make_model(graph, opset_imports=known)
    optimize(proto)
    assert numpy_helper.to_array(proto.graph.initializer[0]).shape == (1, 1, 3, 3)


def test_weights_with_two_readers_stay_whole() -> None:
    proto = convolution(1, 3, [1, 1, 1, 1], 1, 1)
    other = helper.make_node("Identity", ["w"], ["also"])
    proto.graph.node.append(other)
    proto.graph.output.append(helper.make_tensor_value_info("also", 1, [3, 2, 3, 3]))
    optimize(proto)
    assert list(proto.graph.initializer[0].dims) == [3, 2, 3, 3]
