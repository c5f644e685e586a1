"""Compare the integers of an INT8 model and of the fake-quantized network, layer by layer.

Each layer gets the integers of the fake-quantized network, so that the error of one layer does not
reach the next layer.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.quantization.arithmetic import Quantize
from lightning_qat.quantization.attach import quantization_of
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.to_openvino import for_openvino

LAYERS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
INTEGER_LAYERS = (
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger",
    "MatMulIntegerToFloat",
)  # fmt: skip
Steps = tuple[float, int]  # scale and zero point
Example = tuple[tuple[Any, ...], dict[str, Any]]


class _Capture(Quantize):
    """Run a quantized network and keep all integers, by scale and zero point."""

    def __init__(self, owner: Quantization) -> None:
        super().__init__(owner)
        self.integers: dict[Steps, list[np.ndarray]] = defaultdict(list)

    def _keep(self, name: str, x: Tensor) -> Tensor:
        scale, zero_point = self._qparams(name)
        integers = (torch.round(x / scale) + zero_point).to(torch.int32).numpy()
        self.integers[float(scale), int(zero_point)].append(integers)
        return x

    def _quantize(self, name: str, x: Tensor, within: Any = None) -> Tensor:
        return self._keep(name, super()._quantize(name, x, within))

    def _inputs(self, call: Any, operands: list[Tensor]) -> list[Tensor]:
        for position, name in call.again.items():
            self._keep(name, operands[position])
        return super()._inputs(call, operands)

    def _end(self, call: Any, *rest: Any) -> Tensor:
        return self._keep(call.output, super()._end(call, *rest))


def integers_of(net: nn.Module, example: Example) -> dict[Steps, list[np.ndarray]]:
    """Return the integers of all quantized activations, by scale and zero point."""
    quantization = quantization_of(net)
    assert quantization is not None
    mode = _Capture(quantization)
    quantization.run_in(mode, *example[0], **example[1])
    return mode.integers


def _nearest(found: np.ndarray, candidates: list[np.ndarray]) -> np.ndarray | None:
    """Return the candidate of the same shape with the fewest different values.

    Max-pool and reshape keep scale and zero point, so several tensors may have the same ones.
    """
    same = [x for x in candidates if x.shape == found.shape]
    return min(same, key=lambda x: np.count_nonzero(x != found), default=None)


class _Difference:
    """Count values, and the values that are some steps off."""

    def __init__(self) -> None:
        self.values = self.off = self.worst = 0

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        steps = np.abs(found.astype(np.int32) - expected)
        self.values += steps.size
        self.off += int(np.count_nonzero(steps))
        self.worst = max(self.worst, int(steps.max(initial=0)))

    def row(self) -> dict[str, int]:
        return {"values": self.values, "off": self.off, "worst": self.worst}


def compare_onnx(
    net: nn.Module,
    example: Example,
    proto: onnx.ModelProto,
    expected: list[Tensor],
    distance: Callable[[list[Tensor], list[Tensor]], float],
) -> dict[str, Any]:
    """Compare ONNX Runtime and OpenVINO with the fake-quantized network.

    Returns:
        ``integer_layers`` and ``float_layers`` of ONNX Runtime's optimized graph; ``values``,
            ``off`` (unequal values) and ``worst`` (steps) of all integers, layer by layer;
            ``distance`` of the outputs, and ``openvino_distance`` or ``openvino_error``.
    """
    feeds = dict(zip([x.name for x in proto.graph.input], _arrays(example), strict=False))
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = _options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
        options.optimized_model_filepath = str(optimized)
        _session(proto, options)
        graph_of_runtime = onnx.load(optimized)
    session = _session(proto, _options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL))
    found = [torch.from_numpy(x) for x in session.run(None, feeds)]
    row: dict[str, Any] = _count_layers(graph_of_runtime.graph)
    row |= _by_layer(proto, graph_of_runtime, feeds, integers_of(net, example)).row()
    row["distance"] = distance(found, expected)
    return row | _openvino(proto, feeds, expected, distance)


def _arrays(example: Example) -> list[np.ndarray]:
    return [x.numpy() for x in tree_leaves(example) if isinstance(x, Tensor)]


def _options(level: Any) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    return options


def _session(
    proto: onnx.ModelProto, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _count_layers(graph: onnx.GraphProto) -> dict[str, Any]:
    """Count the layers with constant weights that run in integers, and in float."""
    constants = {x.name for x in graph.initializer}
    for node in graph.node:
        is_simple = node.op_type in ("DequantizeLinear", "Constant", "Transpose", "Identity")
        if is_simple and all(name in constants for name in node.input if name):
            constants.update(node.output)
    layers = [node for node in graph.node if any(x in constants for x in node.input[1:2])]
    floats = Counter(node.op_type for node in layers if node.op_type in LAYERS)
    integer = sum(node.op_type in INTEGER_LAYERS for node in graph.node)
    return {"integer_layers": integer, "float_layers": dict(floats)}


def _by_layer(
    proto: onnx.ModelProto,
    optimized: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    integers: dict[Steps, list[np.ndarray]],
) -> _Difference:
    """Run once to get all integers, then run again with the network's own integers."""
    steps = _steps_of_integers(proto.graph)
    produced = {name: node for node in optimized.graph.node for name in node.output}
    moves = ("MaxPool", "Transpose", "Reshape", "Flatten", "Slice", "Split", "Squeeze", "Gather")
    names = [n for n in steps if n in produced and produced[n].op_type not in moves]
    types = {x.name: x for x in optimized.graph.value_info}
    graph = optimized.graph
    given = {x.name for x in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    plain = _options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    values = dict(zip(names, _session(optimized, plain).run(names, feeds), strict=True))
    own = {name: _nearest(values[name], integers.get(steps[name], [])) for name in names}
    fed = {name: x.astype(values[name].dtype) for name, x in own.items() if x is not None}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in fed:
                node.input[position] = f"{name}_fed"
    for name, x in fed.items():
        kind = types[name].type.tensor_type.elem_type if name in types else None
        kind = kind or onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(f"{name}_fed", kind, x.shape))
    feeds = feeds | {f"{name}_fed": x for name, x in fed.items()}
    found = _session(optimized, plain).run(list(fed), feeds)
    difference = _Difference()
    for value, expected in zip(found, fed.values(), strict=True):
        difference.add(value, expected.astype(np.int32))
    return difference


def _steps_of_integers(graph: onnx.GraphProto) -> dict[str, Steps]:
    """Return scale and zero point of each integer activation."""
    constants = {x.name: x for x in graph.initializer}
    steps = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants:
            scale, zero_point = (numpy_helper.to_array(constants[x]) for x in node.input[1:3])
            if scale.ndim == 0:
                steps[node.input[0]] = float(scale), int(zero_point)
    return steps


def _openvino(
    proto: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    expected: list[Tensor],
    distance: Callable[[list[Tensor], list[Tensor]], float],
) -> dict[str, Any]:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(for_openvino(proto), file)  # the same form as train.py's OpenVINO file
        try:
            core = openvino.Core()
            model = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            result = model(feeds)
        except Exception as error:  # a file that does not load is an entry of the table
            return {"openvino_error": str(error).strip().splitlines()[-1][:200]}
    found = [torch.from_numpy(result[output]) for output in model.outputs]
    return {"openvino_distance": distance(found, expected)}


_COMPUTING = (
    torch.quantize_per_tensor, torch.ops.aten.clamp, torch.ops.quantized.add,
    torch.ops.quantized.add_relu, torch.ops.quantized.hardswish,
)  # fmt: skip


class _Interpreter(fx.Interpreter):
    """Run torch's INT8 model, each integer layer on the network's own integers."""

    def __init__(self, model: fx.GraphModule, integers: dict[Steps, list[np.ndarray]]) -> None:
        super().__init__(model)
        self.integers, self.difference = integers, _Difference()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node. If its result holds integers, compare them and replace them."""
        result = super().run_node(n)
        clamps = [user for user in n.users if user.target is torch.ops.aten.clamp]
        computes = n.op == "call_module" or n.target in _COMPUTING
        if not (isinstance(result, Tensor) and result.is_quantized and computes) or clamps:
            return result
        steps = result.q_scale(), result.q_zero_point()
        found = result.int_repr().numpy()
        candidates = [
            x for (scale, zero_point), tensors in self.integers.items()
            if zero_point == steps[1] and np.isclose(scale, steps[0], rtol=1e-6) for x in tensors
        ]  # fmt: skip
        own = _nearest(found, candidates)
        if own is None:
            return result
        self.difference.add(found, own)
        real = (torch.from_numpy(own) - steps[1]).double() * steps[0]
        return torch.quantize_per_tensor(real.float(), *steps, result.dtype)


def compare_torch(net: nn.Module, example: Example, int8_model: Any) -> dict[str, Any]:
    """Compare torch's integer kernels with the fake-quantized network, layer by layer."""
    interpreter = _Interpreter(int8_model, integers_of(net, example))
    with torch.no_grad():
        interpreter.run(*[x for x in tree_leaves(example) if isinstance(x, Tensor)])
    return dict(interpreter.difference.row())
