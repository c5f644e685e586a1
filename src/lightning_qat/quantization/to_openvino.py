"""Convert a quantized or float network to OpenVINO. It needs the packages onnx and openvino."""

import copy
import functools
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.to_onnx import to_onnx

if TYPE_CHECKING:
    import onnx
    import openvino


def to_openvino(
    model: nn.Module,
    *args: Any,
    dynamic: Literal["batch", "size"] = "batch",
    **kwargs: Any,
) -> "openvino.Model":
    """Convert a network to an OpenVINO model that keeps every rounding of the network.

    OpenVINO can also read a file of ``to_onnx``, but then it skips some roundings.

    Example::

        model = to_openvino(callback.int8_model)
        settings = {"INFERENCE_PRECISION_HINT": "f32"}  # else floats may become bfloat16
        compiled = openvino.compile_model(model, "CPU", settings)

    Args:
        model, args, dynamic, kwargs: see ``to_onnx``.

    Raises:
        UserError: see ``to_onnx``; or OpenVINO is not installed.
    """
    core = openvino_core()
    proto = for_openvino(to_onnx(model, *args, dynamic=dynamic, **kwargs))
    return core.read_model(proto.SerializeToString())


def openvino_core() -> Any:
    """Return OpenVINO's core of this process. It exists as long as the process.

    Each core gives the thread that compiles with it a stack for signals (seen in 2026.4). If
    several cores end in another order than they began, the next signal uses a freed stack, and a
    Ctrl-C would crash the process.

    Raises:
        UserError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            "the package 'openvino' is not installed. Run: pip install 'lightning_qat[openvino]'"
        ) from error
    return _only_instance(openvino.Core)


@functools.cache
def _only_instance(core: type) -> Any:
    return core()


def for_openvino(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return a copy of an ONNX model that OpenVINO computes without a wrong or missing rounding."""
    proto = copy.deepcopy(proto)
    _multiply_without_reshaping(proto.graph)
    _keep_every_rounding(proto)
    return proto


def _multiply_without_reshaping(graph: "onnx.GraphProto") -> None:
    """Replace Reshape, Gemm, Reshape by MatMul and Add, which take any number of axes.

    OpenVINO's quantization moves scales through the reshapes, which then have a wrong shape (seen
    in 2026.4): it refuses Hugging Face's Swin, and computes other numbers for its SegFormer.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    producers = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights = {weight.name: weight for weight in graph.initializer}
    nodes: dict[str, list[onnx.NodeProto]] = {}  # by the output of the node that they replace
    for node in graph.node:
        if node.op_type != "Gemm":
            continue
        before, weight, after = (
            producers.get(node.input[0]),
            producers.get(node.input[1]),
            users.get(node.output[0], []),
        )
        is_between = before is not None and before.op_type == "Reshape" and len(after) == 1
        if not is_between or after[0].op_type != "Reshape":
            continue
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in weights:
            continue
        name, output = f"{weight.input[0]}_transposed", after[0].output[0]
        if name not in weights:
            columns = np.ascontiguousarray(numpy_helper.to_array(weights[weight.input[0]]).T)
            weights[name] = numpy_helper.from_array(columns, name)
            graph.initializer.append(weights[name])
        dequantize = helper.make_node(
            "DequantizeLinear", [name, *weight.input[1:]], [f"{output}_weight"], axis=1
        )
        assert before is not None
        product = output if len(node.input) < 3 else f"{output}_product"
        steps = [helper.make_node("MatMul", [before.input[0], f"{output}_weight"], [product])]
        if product != output:
            steps.append(helper.make_node("Add", [product, node.input[2]], [output]))
        nodes |= {node.output[0]: [dequantize, *steps], output: []}
    new = [x for node in graph.node for x in nodes.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(new)


def _keep_every_rounding(proto: "onnx.ModelProto") -> None:
    """Add what keeps OpenVINO from leaving roundings out.

    Where it fuses convolution, quantize, sum and quantize into one kernel, its CPU plugin leaves
    the first rounding out, if that comes right behind the convolution ("drop rounding one special
    residual pattern", dnnl_postops_composer.cpp): 16 % of the sums then come out one step off. A
    leaky ReLU of slope 1, which changes nothing, stands between the two. So it does in front of a
    clip in float, and of a mean over one axis, which would swallow the rounding before them.
    """
    import onnx

    producers = {output: node for node in proto.graph.node for output in node.output}
    summands = {
        name for node in proto.graph.node if node.op_type in ("Add", "Sub") for name in node.input
    }
    is_int8 = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    quantized = {producers[name].input[0] for name in summands if name in producers}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        rounds_a_summand = node.op_type == "QuantizeLinear" and node.output[0] in quantized
        if is_int8 and (rounds_a_summand or _swallows_a_rounding(node, proto, producers)):
            same = f"{node.output[0]}_same"
            nodes.append(
                onnx.helper.make_node("LeakyRelu", [node.input[0]], [same], same, alpha=1.0)
            )
            node.input[0] = same
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _swallows_a_rounding(
    node: "onnx.NodeProto", proto: "onnx.ModelProto", producers: "dict[str, onnx.NodeProto]"
) -> bool:
    from onnx import numpy_helper

    if node.op_type == "Clip":  # a clip on integers keeps the rounding
        return node.input[0] in producers and producers[node.input[0]].op_type != "QuantizeLinear"
    axes = [x for x in proto.graph.initializer if x.name in node.input[1:]]
    return node.op_type == "ReduceMean" and sum(numpy_helper.to_array(x).size for x in axes) == 1
