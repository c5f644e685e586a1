"""Export a quantized or float network as ONNX. Inputs have the names of forward's arguments."""

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from lightning_qat.errors import UserError
from lightning_qat.quantization.attach import quantization_of, quantized_networks
from lightning_qat.quantization.exported import export_program
from lightning_qat.quantization.lower import lower
from lightning_qat.quantization.onnx_export import export_onnx
from lightning_qat.quantization.onnx_names import input_names, output_names

if TYPE_CHECKING:
    import onnx


def to_onnx(
    model: nn.Module,
    *args: Any,
    dynamic: Literal["batch", "size"] = "batch",
    **kwargs: Any,
) -> "onnx.ModelProto":
    """Export a network as ONNX. A quantized network gets QuantizeLinear and DequantizeLinear.

    Example::

        onnx.save(to_onnx(callback.int8_model), "model.onnx")

    Args:
        model: a callback's ``int8_model``, a quantized network, a module around one of them, or a
            float network; on the CPU. It is not changed.
        args, kwargs: an example of its inputs. Without them, the example of the callback is used.
        dynamic: ``batch``: any number of samples; ``size``: any height and width, too.

    Returns:
        The ONNX model. Inputs have the names of the arguments of ``forward``. Outputs have the keys
            of the returned dict or dataclass, or ``output``.

    Raises:
        UserError: the example does not fit, or there is no example; the network has no scales yet.
    """
    model = with_quantized_networks(model)
    if not args and not kwargs:
        args, kwargs = _recorded(model)
    forward: Any = model.forward
    modes = {module: module.training for module in model.modules()}
    try:
        names = input_names(forward, args, kwargs)
        with torch.no_grad():
            output = model.eval()(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:  # torch's operators raise errors of many types
        raise UserError(
            f"{type(model).__name__} cannot be run on these example inputs: {error}. Give to_onnx "
            "what its forward takes."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return export_onnx(program_of(model, args, kwargs, dynamic), names, output_names(output))


def program_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic: Literal["batch", "size"] = "batch",
) -> ExportedProgram:
    """Export a module: lowered if it holds quantized networks, else in float."""
    if quantized_networks(model):
        return lower(model, args, kwargs, dynamic)
    modes = {module: module.training for module in model.modules()}
    try:
        return export_program(model.eval(), args, kwargs or {}, dynamic)
    finally:
        for module, training in modes.items():
            module.training = training


def with_quantized_networks(model: nn.Module) -> nn.Module:
    """Return ``model`` with each INT8 model replaced by its quantized network."""
    sources = {
        id(module): module.meta["source"]  # type: ignore[index]
        for module in model.modules()
        if "source" in getattr(module, "meta", {})
    }
    if not sources:
        return model
    return copy.deepcopy(model, memo=sources)


def _recorded(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantization = quantization_of(model)
    if quantization is None or quantization.example is None:
        raise UserError(
            f"to_onnx does not know what {type(model).__name__} takes: give it example inputs, as "
            "in to_onnx(model, images)."
        )
    return quantization.example
