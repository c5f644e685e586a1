"""Rewrite transposed convolutions of an ONNX graph as convolutions, which run in integers.

ONNX Runtime has no integer kernel for ConvTranspose. But with stride s, the layer is a convolution
with s x s times the channels, whose outputs DepthToSpace puts side by side: Shi et al., "Is the
deconvolution layer the same as a convolutional layer?" (2016).
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

_BETWEEN = ("Relu", "Clip")  # may stand between the layer and its QuantizeLinear


def replace_transposed(graph: onnx.GraphProto) -> None:
    """Replace quantized ConvTranspose nodes of two dimensions, without groups and dilation."""
    producers = {output: node for node in graph.node for output in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    nodes: dict[str, list[onnx.NodeProto]] = {}  # by the output of the node that they replace
    for node in graph.node:
        if node.op_type != "ConvTranspose":
            continue
        last = node
        while last.op_type in ("ConvTranspose", *_BETWEEN) and len(users[last.output[0]]) == 1:
            last = users[last.output[0]][0]
        constants = [producers[name] for name in node.input[1:] if name in producers]
        is_layer = [x.op_type for x in constants] == ["DequantizeLinear"] * len(node.input[1:])
        if last.op_type != "QuantizeLinear" or not is_layer:
            continue
        if weights[last.input[2]].data_type != onnx.TensorProto.UINT8:
            continue  # signed integers are for TensorRT, which has a kernel
        plan = _Plan(node, numpy_helper.to_array(weights[constants[0].input[0]]))
        if plan.is_possible:
            nodes[node.output[0]] = _convolution(graph, node, constants, plan, weights)
            nodes[last.output[0]] = _rearranged(graph, last, plan)
    new = [x for node in graph.node for x in nodes.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(new)


class _Plan:
    """The convolution that computes the same sums as a transposed convolution.

    With padding p, the output at ``s * m + r`` takes input ``m + e`` times the tap ``t`` of the
    kernel where ``t = r + p - s * e``. So the new kernel runs over ``e``, for each phase ``r``.

    Attributes:
        is_possible: False if ONNX Runtime's operators cannot express it.
        stride: s, the same in both dimensions.
        kernel: the new weight, (outputs * s * s) x inputs x height x width.
        pads: of the new convolution: top, left, bottom, right.
        crop: rows and columns to remove at the end.
    """

    def __init__(self, node: onnx.NodeProto, kernel: np.ndarray) -> None:
        settings = {x.name: helper.get_attribute_value(x) for x in node.attribute}
        strides = settings.get("strides", [1, 1])
        self.stride = stride = strides[0]
        self.is_possible = (
            kernel.ndim == 4
            and len(set(strides)) == 1
            and settings.get("group", 1) == 1
            and set(settings.get("dilations", [1])) == {1}
            and settings.get("auto_pad", b"NOTSET") == b"NOTSET"
            and "output_shape" not in settings
        )
        if not self.is_possible:
            return
        pads, more = settings.get("pads", [0] * 4), settings.get("output_padding", [0, 0])
        begins, ends, self.crop = [], [], []
        inputs, outputs = kernel.shape[:2]
        axes = []
        for size, before, after, added in zip(
            kernel.shape[2:], pads[:2], pads[2:], more, strict=True
        ):
            steps = [(r, t, (r + before - t) // stride) for r in range(stride) for t in range(size)]
            steps = [(r, t, e) for r, t, e in steps if (r + before - t) % stride == 0]
            first, last = min(e for *_, e in steps), max(e for *_, e in steps)
            length = size + added - stride - before - after  # output size - stride * input size
            blocks = -(-length // stride)
            begins.append(-first)
            ends.append(blocks + last)
            self.crop.append(blocks * stride - length)
            axes.append([(r, t, e - first) for r, t, e in steps])
        self.pads = begins + ends
        self.is_possible = min(self.pads) >= 0
        sizes = [max(e for *_, e in steps) + 1 for steps in axes]
        phases = np.zeros((outputs, stride, stride, inputs, *sizes), kernel.dtype)
        for row, tap, height in axes[0]:
            for column, other, width in axes[1]:
                phases[:, row, column, :, height, width] = kernel[:, :, tap, other].T
        self.kernel = phases.reshape(outputs * stride * stride, inputs, *sizes)


def _convolution(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    constants: list[onnx.NodeProto],
    plan: _Plan,
    weights: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Return the convolution with its dequantized weight and bias."""
    name, new = node.output[0], []
    for position, constant in enumerate(constants):
        arrays = [numpy_helper.to_array(weights[x]) for x in constant.input]
        values = [np.repeat(x, plan.stride**2) if x.ndim else x for x in arrays]
        if position == 0:
            values[0] = plan.kernel
        names = [f"{name}_{position}_{i}" for i in range(len(values))]
        for x, value in zip(names, values, strict=True):
            graph.initializer.append(numpy_helper.from_array(value, x))
        new.append(helper.make_node("DequantizeLinear", names, [f"{names[0]}_float"], axis=0))
    inputs = [node.input[0], *(x.output[0] for x in new)]
    new.append(helper.make_node("Conv", inputs, [name], name, pads=plan.pads))
    return new


def _rearranged(
    graph: onnx.GraphProto, quantize: onnx.NodeProto, plan: _Plan
) -> list[onnx.NodeProto]:
    """Return ``quantize``, then the integers at their places."""
    name = quantize.output[0]
    rounded = onnx.NodeProto()
    rounded.CopyFrom(quantize)
    rounded.output[0] = f"{name}_phases"
    blocks = name if not any(plan.crop) else f"{name}_blocks"
    new = [
        rounded,
        helper.make_node(
            "DepthToSpace", [rounded.output[0]], [blocks], blocks, blocksize=plan.stride, mode="CRD"
        ),
    ]
    if any(plan.crop):
        ends = [-x or np.iinfo(np.int64).max for x in plan.crop]
        inputs = {"starts": [0, 0], "ends": ends, "axes": [2, 3]}
        for key, value in inputs.items():
            graph.initializer.append(numpy_helper.from_array(np.array(value), f"{name}_{key}"))
        new.append(
            helper.make_node("Slice", [blocks, *(f"{name}_{x}" for x in inputs)], [name], name)
        )
    return new
