"""Export a quantized network as ONNX with QuantizeLinear and DequantizeLinear."""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from lightning_qat.errors import UserError
from lightning_qat.quantization import ops

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first opset with Gelu, which is faster than its parts
_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")


def export_onnx(
    program: ExportedProgram, input_names: list[str], output_names: list[str]
) -> "onnx.ModelProto":
    """Export ``program`` as ONNX. Every integer stays equal.

    Args:
        program: a program of ``export_program``.
        input_names: one name for each input tensor of the network.
        output_names: one name for each output tensor of the network.

    Raises:
        UserError: the packages of the extra ``onnx`` are missing.
        torch.onnx.errors.OnnxExporterError: ONNX has no form of an operation of the network.
        onnx.checker.ValidationError: the exporter's result is not valid ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(
            f"Writing ONNX needs the package {error.name!r}, which is not installed. "
            "Run: pip install 'lightning-qat[onnx]'"
        ) from error
    from lightning_qat.quantization.onnx_passes import optimize

    with _silence(), torch.no_grad():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=input_names,
            output_names=output_names,
            opset_version=OPSET,
            custom_translation_table=_translations(),
            optimize=False,  # torch's optimization takes minutes for a large network
        )
        assert exported is not None  # only torch's old exporter returns None
        _simplify(exported.model)
    proto = exported.model_proto
    _strip(proto)
    _name_dimensions(proto.graph)
    optimize(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings and logs of torch's exporter about its own parts."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _simplify(model: Any) -> None:
    """Compute constant values, and keep only one of equal values."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    common.InlinePass()(model)
    for _ in range(2):  # the second round sees the shapes that the first one found
        onnxscript.optimizer.fold_constants(model)
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        simplify(model)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the ONNX form of each operator of this package."""
    import numpy as np
    from onnxscript import ir
    from onnxscript import opset20 as op

    def constant(value: Any, dtype: Any) -> Any:
        tensor: Any = ir.tensor(np.asarray(value, dtype))
        return op.Constant(value=tensor)

    def quantize(
        x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, signed: bool
    ) -> Any:
        dtype = np.int8 if signed else np.uint8
        limits = np.iinfo(dtype)
        integers = op.QuantizeLinear(x, constant(scale, np.float32), constant(zero_point, dtype))
        if (quant_min, quant_max) == (limits.min, limits.max):
            return integers
        # With the Clip between the two operators, ONNX Runtime still detects an integer layer.
        return op.Clip(integers, constant(quant_min, dtype), constant(quant_max, dtype))

    def dequantize(integers: Any, scale: float, zero_point: int) -> Any:
        dtype = integers.dtype.numpy()
        return op.DequantizeLinear(
            integers, constant(scale, np.float32), constant(zero_point, dtype)
        )

    def dequantize_per_channel(integers: Any, scale: Any, axis: int, layer: str) -> Any:
        # ONNX Runtime fuses a linear layer only if the zero points are given.
        zero_points = constant(np.zeros(scale.shape.numpy()), integers.dtype.numpy())
        return op.DequantizeLinear(integers, scale, zero_points, axis=axis)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        rank = len(x.shape)
        rows = x if rank == 2 else op.Reshape(x, constant([-1, x.shape[-1]], np.int64))
        inputs = (rows, weight) if bias is None else (rows, weight, bias)
        y = op.Gemm(*inputs, transB=1)
        if rank == 2:
            return y
        sizes = [d if isinstance(d, int) else -1 for d in (*x.shape[:-1], weight.shape[0])]
        if sizes.count(-1) <= 1:
            return op.Reshape(y, constant(sizes, np.int64))
        leading = op.Shape(x, end=-1)
        return op.Reshape(y, op.Concat(leading, constant([sizes[-1]], np.int64), axis=0))

    operators = getattr(torch.ops, ops.NAMESPACE)
    return {
        operators.quantize.default: quantize,
        operators.dequantize.default: dequantize,
        operators.dequantize_per_channel.default: dequantize_per_channel,
        torch.ops.aten.linear.default: linear,
    }


def _name_dimensions(graph: "onnx.GraphProto") -> None:
    """Name the free dimensions of inputs ``batch``, ``height`` and ``width``."""
    names: dict[str, str] = {}
    for value in graph.input:
        dimensions = value.type.tensor_type.shape.dim
        for position, dimension in enumerate(dimensions):
            if position == 0:
                name = "batch"
            elif len(dimensions) >= 4 and position >= len(dimensions) - 2:
                name = "height" if position == len(dimensions) - 2 else "width"
            else:
                continue
            if dimension.dim_param and dimension.dim_param not in names:
                taken = sum(x.startswith(name) for x in names.values()) if position else 0
                names[dimension.dim_param] = f"{name}_{taken}" if taken else name
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:  # an expression of several symbols
                dimension.dim_param = re.sub(
                    r"\w+", lambda found: names.get(found[0], found[0]), dimension.dim_param
                )


def _strip(proto: "onnx.ModelProto") -> None:
    """Remove stack traces, which name files of this machine, and unnecessary shapes."""
    del proto.metadata_props[:]
    _strip_graph(proto.graph)
    for function in proto.functions:
        _strip_graph(function)


def _strip_graph(graph: Any) -> None:
    del graph.metadata_props[:]
    del graph.value_info[:]
    graph.doc_string = ""
    values = [*graph.node, *getattr(graph, "initializer", ())]
    if hasattr(graph, "initializer"):  # a function has only names
        values += [*graph.input, *graph.output]
    for value in values:
        value.doc_string = ""
        del value.metadata_props[:]
    for attribute in (a for node in graph.node for a in node.attribute):
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            _strip_graph(inner)
