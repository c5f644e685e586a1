"""ONNX files of image classifiers."""

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.atomic import atomic_path
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.errors import UserError
from lightning_qat.quantization.onnx_export import export_onnx
from lightning_qat.quantization.to_onnx import program_of, with_quantized_networks


def to_onnx(model: nn.Module, images: Tensor) -> onnx.ModelProto:
    """Export ``model`` as ONNX and check it: input ``images`` of any batch size, output ``logits``.

    Args:
        model: a quantized network, a float network, an INT8 model, or a module around one of them.
        images: two or more images for the model. The file accepts only their height and width.

    Raises:
        UserError: the model does not accept ``images`` as its only input.
        torch.onnx.errors.OnnxExporterError: ONNX has no form of an operation of the network.
    """
    model = with_quantized_networks(model)
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # torch's operators raise errors of many types
        raise UserError(
            f"{type(model).__name__} does not take these images: {error}. For other inputs use "
            "lightning_qat.to_onnx(model, *example_inputs)."
        ) from error
    return from_program(program_of(model, (images,)))


def from_program(program: ExportedProgram) -> onnx.ModelProto:
    """Export a program of an image classifier as ONNX."""
    return export_onnx(program, ["images"], ["logits"])


def save_onnx(proto: onnx.ModelProto, path: Path, description: Description) -> int:
    """Write ``proto`` and its description, completely or not at all; return the file's bytes."""
    onnx.helper.set_model_props(proto, {KEY: description.to_json()})
    with atomic_path(path) as partial:
        partial.write_bytes(proto.SerializeToString())
    return path.stat().st_size
