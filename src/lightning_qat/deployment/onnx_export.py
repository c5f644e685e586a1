"""ONNX files of image classifiers."""

from pathlib import Path

import onnx
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.atomic import atomic_path
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.quantization.onnx_export import export_onnx
from lightning_qat.quantization.to_onnx import program_of, with_quantized_networks


def to_onnx(model: nn.Module, images: Tensor) -> onnx.ModelProto:
    """Write ``model`` as ONNX: input ``images`` with any batch size, output ``logits``; checked.

    Args:
        model: quantized or in float, an INT8 model, or a module around one of them.
        images: what it takes, two images or more; height and width are fixed to theirs.

    Raises:
        torch.onnx.errors.OnnxExporterError: ONNX has no form for an operation of the network.
    """
    return from_program(program_of(with_quantized_networks(model), (images,)))


def from_program(program: ExportedProgram) -> onnx.ModelProto:
    """Write an exported image classifier as ONNX."""
    return export_onnx(program, ["images"], ["logits"])


def save_onnx(proto: onnx.ModelProto, path: Path, description: Description) -> int:
    """Write ``proto`` with its description, whole or not at all; return the file's bytes."""
    onnx.helper.set_model_props(proto, {KEY: description.to_json()})
    with atomic_path(path) as partial:
        partial.write_bytes(proto.SerializeToString())
    return path.stat().st_size
