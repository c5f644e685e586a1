"""Kernels without the weights that only ever meet padding.

Late layers see maps smaller than their kernels: at 32 x 32 pixels, ResNet18 with ImageNet's stem
ends in maps of 1 x 1, of which a 3 x 3 kernel uses one weight in nine. An exported graph has a
fixed image size, so the others can go: the rest computes the same numbers, from half the bytes.
"""

from collections import Counter

import onnx
from onnx import numpy_helper


def crop_kernels(proto: onnx.ModelProto) -> None:
    """Crop the kernels of all convolutions of ``proto``, in place."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    producers = {output: node for node in proto.graph.node for output in node.output}
    weights = {weight.name: weight for weight in proto.graph.initializer}
    uses = Counter(name for node in proto.graph.node for name in node.input)
    for node in proto.graph.node:
        sizes = shapes.get(node.input[0], [])[2:]
        if node.op_type != "Conv" or not sizes or not all(sizes):
            continue
        name = node.input[1]
        if name in producers and producers[name].op_type == "DequantizeLinear":
            name = producers[name].input[0]
        if name in weights and uses[name] == uses[node.input[1]] == 1:
            _crop(node, weights[name], sizes)


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
        reach = (outputs - 1) * stride + dilation * (last - first) + 1  # of the last output
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
