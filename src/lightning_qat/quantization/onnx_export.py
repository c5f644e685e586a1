"""Write an exported, quantized network as ONNX with QuantizeLinear and DequantizeLinear."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from lightning_qat.errors import UserError
from lightning_qat.quantization import ops

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first one with Gelu, which runtimes compute faster than its parts
_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")


def export_onnx(
    program: ExportedProgram, input_names: list[str], output_names: list[str]
) -> "onnx.ModelProto":
    """Write ``program`` as ONNX; every integer stays equal.

    Args:
        program: from ``export_program``.
        input_names: one name for each tensor that the network takes.
        output_names: one name for each tensor that it returns.

    Raises:
        UserError: the packages of the extra ``onnx`` are missing.
        torch.onnx.errors.OnnxExporterError: ONNX has no form for an operation of the network.
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
        )
    assert exported is not None  # torch gives None only from its old exporter
    proto = exported.model_proto
    _strip(proto)
    optimize(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch's exporter from warning and logging about its own parts."""
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


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Give the ONNX form of each of our operators."""
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
        # Between the two operators, ONNX Runtime still finds the pattern of an integer layer.
        return op.Clip(integers, constant(quant_min, dtype), constant(quant_max, dtype))

    def dequantize(integers: Any, scale: float, zero_point: int) -> Any:
        dtype = integers.dtype.numpy()
        return op.DequantizeLinear(
            integers, constant(scale, np.float32), constant(zero_point, dtype)
        )

    def dequantize_per_channel(integers: Any, scale: Any, axis: int, layer: str) -> Any:
        # ONNX Runtime fuses a linear layer only where the zero points are written.
        zero_points = constant(np.zeros(scale.shape.numpy()), integers.dtype.numpy())
        return op.DequantizeLinear(integers, scale, zero_points, axis=axis)

    operators = getattr(torch.ops, ops.NAMESPACE)
    return {
        operators.quantize.default: quantize,
        operators.dequantize.default: dequantize,
        operators.dequantize_per_channel.default: dequantize_per_channel,
    }


def _strip(proto: "onnx.ModelProto") -> None:
    """Remove stack traces, which name files of this machine, and shapes that nobody needs."""
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
