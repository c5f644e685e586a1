"""ONNX files: the INT8 network as QuantizeLinear and DequantizeLinear around float operations."""

import copy
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from lightning_qat.atomic import atomic_path
from lightning_qat.deployment.crop import crop_kernels
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.deployment.qdq import qdq
from lightning_qat.quantization.convert import Int8Model

OPSET = 18  # the one torch's exporter is written for; per-channel QuantizeLinear needs 13


def to_onnx(model: nn.Module, images: Tensor) -> onnx.ModelProto:
    """``model`` as ONNX: input ``images`` with any batch size, output ``logits``; checked.

    Args:
        model: in eval mode; an INT8 network, one that holds some, or a float one. What is INT8
            becomes QuantizeLinear and DequantizeLinear, see ``qdq``.
        images: what it takes in, two images or more; height and width are fixed to theirs.

    Raises:
        onnx.checker.ValidationError: the exporter's result is not valid ONNX.
        NotImplementedError: a layer has no form in ONNX here.
    """
    if isinstance(model, Int8Model):
        model = qdq(model)
    else:
        model = copy.copy(model)
        model._modules = {
            name: qdq(child) if isinstance(child, Int8Model) else child
            for name, child in model.named_children()
        }
    for exporter in ("onnxscript", "onnx_ir"):
        logging.getLogger(exporter).setLevel(logging.WARNING)  # they report each merged constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about its own parts
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
        )
    assert program is not None  # as it is where no file name is given
    proto = program.model_proto
    crop_kernels(proto)
    del proto.graph.value_info[:]  # shapes of weights that have been cropped
    onnx.checker.check_model(proto, full_check=True)
    return proto


def save_onnx(proto: onnx.ModelProto, path: Path, description: Description) -> int:
    """Write ``proto`` with its description, whole or not at all; gives the file's bytes."""
    onnx.helper.set_model_props(proto, {KEY: description.to_json()})
    with atomic_path(path) as partial:
        partial.write_bytes(proto.SerializeToString())
    return path.stat().st_size
