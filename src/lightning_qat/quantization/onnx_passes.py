"""Change an ONNX graph so that runtimes are faster and every integer stays equal."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from lightning_qat.quantization.onnx_transposed import replace_transposed

_PADDED_WITH = {"Conv": 0.0, "MaxPool": -np.inf}  # the padding value of each operator


def optimize(proto: onnx.ModelProto) -> None:
    """Apply all passes in place."""
    _quantize_once(proto.graph)
    _fold_pads(proto.graph)
    _fix_reshapes(proto.graph)
    replace_transposed(proto.graph)
    _remove_unused(proto.graph)
    _crop_kernels(proto)
    _separate_zero_points(proto.graph)


class _Values:
    """The producer of each value, the number of its uses, and the constants."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {output: node for node in graph.node for output in node.output}
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(output.name for output in graph.output)

    def constant(self, name: str) -> np.ndarray | None:
        if name in self.weights:
            return numpy_helper.to_array(self.weights[name])
        node = self.producers.get(name)
        if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            return numpy_helper.to_array(node.attribute[0].t)
        return None

    def producer(self, name: str, op_type: str) -> onnx.NodeProto | None:
        node = self.producers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def same_steps(self, a: onnx.NodeProto, b: onnx.NodeProto) -> bool:
        """Return True if two (de)quantize nodes have equal scales, zero points and types."""
        for first, second in zip(a.input[1:], b.input[1:], strict=True):
            x, y = self.constant(first), self.constant(second)
            if x is None or y is None or x.dtype != y.dtype or not np.array_equal(x, y):
                return False
        return True


def _quantize_once(graph: onnx.GraphProto) -> None:
    """Keep integers that are dequantized and then quantized again with the same scale."""
    values = _Values(graph)
    for node in graph.node:
        source = values.producer(node.input[0], "DequantizeLinear") if node.input else None
        if node.op_type == "QuantizeLinear" and source and values.same_steps(source, node):
            _replace(graph, node.output[0], source.input[0])


def _replace(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def _fold_pads(graph: onnx.GraphProto) -> None:
    """Move a Pad before a convolution or a max-pool into that operator's own pads."""
    nodes: list[onnx.NodeProto] = []
    values = _Values(graph)
    for node in graph.node:
        if node.op_type in _PADDED_WITH:
            chain = _up_to_pad(node, values)
            pads = _spatial_pads(chain[-1], _PADDED_WITH[node.op_type], values) if chain else None
            if pads is not None and _add_pads(node, pads):
                source = chain[-1].input[0]
                between = list(reversed(chain[:-1]))
                before = values.producer(source, "DequantizeLinear")
                if between and before and values.same_steps(before, between[0]):
                    between = []
                for step in between:  # steps of quantize and dequantize, on values without padding
                    copied = onnx.NodeProto()
                    copied.CopyFrom(step)
                    copied.input[0] = source
                    source = copied.output[0] = f"{node.name}_{step.output[0]}"
                    copied.name = source
                    nodes.append(copied)
                node.input[0] = source
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _up_to_pad(node: onnx.NodeProto, values: _Values) -> list[onnx.NodeProto]:
    """Return the nodes from ``node``'s input up to a Pad, or an empty list."""
    chain: list[onnx.NodeProto] = []
    step = values.producers.get(node.input[0])
    while step is not None and step.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip"):
        if node.op_type != "Conv":
            return []  # quantizing turns minus infinity into an ordinary value
        chain.append(step)
        step = values.producers.get(step.input[0])
    if step is None or step.op_type != "Pad":
        return []
    return [*chain, step]


def _spatial_pads(node: onnx.NodeProto, expected: float, values: _Values) -> list[int] | None:
    """Return begins and ends of the spatial axes if the padding is the constant ``expected``."""
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
    pads = values.constant(node.input[1])
    value: Any = 0.0
    if len(node.input) > 2 and node.input[2]:
        value = values.constant(node.input[2])
    if mode != b"constant" or pads is None or value is None or float(value) != expected:
        return None
    rank = len(pads) // 2
    if len(node.input) > 3 and node.input[3]:
        axes = values.constant(node.input[3])
        if axes is None or any(axis < 2 for axis in axes):
            return None
        rank = max(axes) + 1
        whole = np.zeros(2 * rank, np.int64)
        for i, axis in enumerate(axes):
            whole[axis], whole[rank + axis] = pads[i], pads[len(axes) + i]
        pads = whole
    begins, ends = pads[:rank], pads[rank:]
    if any(begins[:2]) or any(ends[:2]) or min(pads) < 0:
        return None
    return [int(x) for x in (*begins[2:], *ends[2:])]


def _add_pads(node: onnx.NodeProto, pads: list[int]) -> bool:
    settings = {x.name: x for x in node.attribute}
    if "auto_pad" in settings and settings["auto_pad"].s != b"NOTSET":
        return False
    if "pads" not in settings:
        node.attribute.append(onnx.helper.make_attribute("pads", pads))
        return True
    own = settings["pads"].ints
    if len(own) != len(pads):  # the Pad names fewer spatial axes
        return False
    own[:] = [a + b for a, b in zip(own, pads, strict=True)]
    return True


def _fix_reshapes(graph: onnx.GraphProto) -> None:
    """Write -1 for the only size of a Reshape that is computed from the input's shape."""
    values = _Values(graph)
    for node in graph.node:
        concat = values.producer(node.input[1], "Concat") if node.op_type == "Reshape" else None
        if concat is None:
            continue
        sizes: list[int] = []
        for name in concat.input:
            constant = values.constant(name)
            if constant is not None:
                sizes += [int(x) for x in constant]
            elif _is_one_number(name, values):
                sizes.append(-1)
            else:
                sizes += [-1, -1]  # unknown length
        if sizes.count(-1) == 1 and 0 not in sizes:
            weight = numpy_helper.from_array(np.array(sizes), f"{node.output[0]}_shape")
            graph.initializer.append(weight)
            node.input[1] = weight.name


def _is_one_number(name: str, values: _Values) -> bool:
    reshape = values.producer(name, "Reshape")
    shape = None if reshape is None else values.constant(reshape.input[1])
    return shape is not None and shape.size == 1 and shape[0] in (1, -1)


def _remove_unused(graph: onnx.GraphProto) -> None:
    uses = _Values(graph).uses
    nodes = []
    for node in reversed(graph.node):
        if any(uses[output] for output in node.output):
            nodes.append(node)
        else:
            uses.subtract(node.input)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    for weight in [w for w in graph.initializer if not uses[w.name]]:
        graph.initializer.remove(weight)


def _separate_zero_points(graph: onnx.GraphProto) -> None:
    """Give each weight its own zero points.

    If two weights share them, ONNX Runtime 1.32 fails with ``session.x64quantprecision``.
    """
    weights = {weight.name: weight for weight in graph.initializer}
    seen: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in weights:
            continue
        name = node.input[2]
        if name in seen:
            weight = onnx.TensorProto()
            weight.CopyFrom(weights[name])
            weight.name = node.input[2] = f"{name}_{len(seen)}"
            graph.initializer.append(weight)
        seen.add(node.input[2])


def _crop_kernels(proto: onnx.ModelProto) -> None:
    """Remove kernel weights that only meet padding, if the image size is fixed.

    The inputs of late layers are smaller than their kernels. At 32 x 32 pixels, ResNet18 with
    ImageNet's stem ends in maps of 1 x 1, where a 3 x 3 kernel uses one weight in nine.
    """
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    values = _Values(proto.graph)
    for node in proto.graph.node:
        sizes = shapes.get(node.input[0], [])[2:] if node.op_type == "Conv" else []
        if not sizes or not all(sizes):
            continue
        name = node.input[1]
        source = values.producer(name, "DequantizeLinear")
        if source is not None and values.uses[name] == 1:
            name = source.input[0]
        if name in values.weights and values.uses[name] == 1:
            _crop(node, values.weights[name], sizes)


def _crop(node: onnx.NodeProto, weight: onnx.TensorProto, sizes: list[int]) -> None:
    settings = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    if settings.get("auto_pad", b"NOTSET") != b"NOTSET":
        return
    axes = len(sizes)
    kernel = numpy_helper.to_array(weight)
    pads = list(settings.get("pads", [0] * 2 * axes))
    for axis, size in enumerate(sizes):
        taps = kernel.shape[2 + axis]
        stride = settings.get("strides", [1] * axes)[axis]
        dilation = settings.get("dilations", [1] * axes)[axis]
        before, after = pads[axis], pads[axes + axis]
        outputs = (size + before + after - dilation * (taps - 1) - 1) // stride + 1
        used = [
            tap
            for tap in range(taps)
            if any(0 <= x * stride - before + tap * dilation < size for x in range(outputs))
        ]
        first = min(used[0] if used else 0, before // dilation)  # padding cannot be negative
        last = max(used, default=0)
        before -= first * dilation
        # end of the last output's window
        reach = (outputs - 1) * stride + dilation * (last - first) + 1
        after = max(0, reach - size - before)
        if size + before + after - reach >= stride:  # a shorter kernel would give more outputs
            continue
        kernel = kernel.take(range(first, last + 1), 2 + axis)
        pads[axis], pads[axes + axis] = before, after
    weight.CopyFrom(numpy_helper.from_array(kernel, weight.name))
    for attribute in node.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = pads
        elif attribute.name == "kernel_shape":
            attribute.ints[:] = kernel.shape[2:]
