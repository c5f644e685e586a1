"""OpenVINO IR, made from the ONNX graph; needs the extra ``openvino``."""

import copy
import errno
import importlib.util
import os
import tempfile
from pathlib import Path

import onnx

from lightning_qat.atomic import PARTIAL
from lightning_qat.deployment.description import KEY, Description


def is_installed() -> bool:
    """Whether the extra ``openvino`` is there."""
    return importlib.util.find_spec("openvino") is not None


def save_openvino(proto: onnx.ModelProto, path: Path, description: Description) -> int:
    """Write ``path`` (.xml) and its weights (.bin beside it); gives the bytes of both.

    Each is there whole or not at all; the .xml, without which the .bin is nothing, comes last.
    """
    import openvino

    weights = path.with_suffix(".bin")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=PARTIAL) as folder:
        onnx_file, partial = Path(folder) / "model.onnx", Path(folder) / path.name
        onnx.save(keep_every_rounding(proto), onnx_file)
        model = openvino.Core().read_model(onnx_file)
        model.set_rt_info(description.to_json(), [KEY])
        try:
            openvino.save_model(model, partial, compress_to_fp16=False)
        except RuntimeError as error:
            if "iostream error" in str(error):  # all that it says of a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        path.unlink(missing_ok=True)  # an older one must not meet the new weights
        partial.with_suffix(".bin").replace(weights)
        partial.replace(path)
    return path.stat().st_size + weights.stat().st_size


def keep_every_rounding(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``proto`` in which OpenVINO leaves no rounding out.

    Where it fuses convolution, quantize, sum and quantize into one kernel, its CPU plugin leaves
    the first rounding out, if that comes right behind the convolution ("drop rounding one special
    residual pattern", dnnl_postops_composer.cpp): 16 % of the sums then come out one step off. A
    leaky ReLU of slope 1, which changes nothing, stands between the two. So it does in front of a
    clip in float, and of a mean over one axis, which would swallow the rounding before them.
    """
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
    node: onnx.NodeProto, proto: onnx.ModelProto, producers: dict[str, onnx.NodeProto]
) -> bool:
    if node.op_type == "Clip":  # on integers it does not
        return node.input[0] in producers and producers[node.input[0]].op_type != "QuantizeLinear"
    axes = [x for x in proto.graph.initializer if x.name in node.input[1:]]
    return (
        node.op_type == "ReduceMean" and sum(onnx.numpy_helper.to_array(x).size for x in axes) == 1
    )
