"""Compare the forms of a network: fake-quantized, torch's kernels, ONNX Runtime."""

from typing import Any

import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_qat.quantization.attach import quantization_of
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.onnx_export import export_onnx

INTEGER_LAYERS = (
    nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.Linear,
    nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d,
)  # fmt: skip


def tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def apart(first: Any, second: Any) -> float:
    """Return the largest difference of two outputs, as a share of the first one's largest value."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    assert pairs
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in pairs)


@torch.no_grad()
def int8_apart(callback: Any, *args: Any, **kwargs: Any) -> float:
    """Return the distance of ``callback``'s INT8 model from its fake-quantized network."""
    expected = callback.networks["fake_quant"](*args, **kwargs)
    return apart(expected, callback.int8_model(*args, **kwargs))


def in_onnx_runtime(net: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Return the result of ONNX Runtime for a fake-quantized ``net``."""
    return run_onnx(lower(net, args, kwargs), *args, **kwargs)


def run_onnx(program: ExportedProgram, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Return the result of ONNX Runtime for a lowered network."""
    given = tensors((args, kwargs))
    outputs = [f"y{i}" for i in range(len(program.graph_signature.user_outputs))]
    proto = export_onnx(program, [f"x{i}" for i in range(len(given))], outputs)
    options = onnxruntime.SessionOptions()
    weights = {x.name for x in proto.graph.initializer if x.data_type == onnx.TensorProto.INT8}
    weights |= {node.output[0] for node in proto.graph.node if node.input[0] in weights}
    read = [name for node in proto.graph.node for name in node.input if name in weights]
    # Weights of all 8 bits saturate on AVX2. ONNX Runtime cannot rewrite a weight that two layers
    # share.
    if _largest_weight(proto) > 64 and len(set(read)) == len(read):
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    inputs = {f"x{i}": x.numpy() for i, x in enumerate(given)}
    inputs = {x.name: inputs[x.name] for x in session.get_inputs()}
    return [torch.from_numpy(y) for y in session.run(None, inputs)]


def _largest_weight(proto: onnx.ModelProto) -> int:
    weights = [x for x in proto.graph.initializer if x.data_type == onnx.TensorProto.INT8]
    arrays = [numpy_helper.to_array(x).astype(int) for x in weights]
    return max((abs(x).max(initial=0) for x in arrays), default=0)


def integer_layers(int8_model: nn.Module) -> list[str]:
    """Return the names of the layers that run on integer kernels."""
    return [name for name, x in int8_model.named_modules() if isinstance(x, INTEGER_LAYERS)]


def scales(net: nn.Module) -> dict[str, Tensor]:
    """Return all ranges and scales of a fake-quantized network."""
    quantization = quantization_of(net)
    assert quantization is not None
    return quantization.scales()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return True if two state dicts have the same names and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)
