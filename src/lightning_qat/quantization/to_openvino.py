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
    proto = keep_every_rounding(to_onnx(model, *args, dynamic=dynamic, **kwargs))
    return core.read_model(proto.SerializeToString())


@functools.cache
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
            "the package 'openvino' is not installed. Run: pip install 'lightning-qat[openvino]'"
        ) from error
    return openvino.Core()


def keep_every_rounding(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return a copy of ``proto`` in which OpenVINO skips no rounding.

    OpenVINO's CPU plugin fuses convolution, quantize, sum and quantize into one kernel. It skips
    the first rounding if that comes directly after the convolution ("drop rounding one special
    residual pattern", dnnl_postops_composer.cpp). Then 16 % of the sums are one step off. So a
    leaky ReLU of slope 1, which changes no value, is inserted between the two. It is also inserted
    before a float clip and before a mean over one axis, because these would remove the rounding
    before them.
    """
    import onnx

    proto = copy.deepcopy(proto)
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
    return proto


def _swallows_a_rounding(
    node: "onnx.NodeProto", proto: "onnx.ModelProto", producers: "dict[str, onnx.NodeProto]"
) -> bool:
    from onnx import numpy_helper

    if node.op_type == "Clip":  # a clip on integers keeps the rounding
        return node.input[0] in producers and producers[node.input[0]].op_type != "QuantizeLinear"
    axes = [x for x in proto.graph.initializer if x.name in node.input[1:]]
    return node.op_type == "ReduceMean" and sum(numpy_helper.to_array(x).size for x in axes) == 1
