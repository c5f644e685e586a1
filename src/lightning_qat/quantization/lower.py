"""Export a quantized network as a graph of integer operators."""

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.errors import UserError
from lightning_qat.quantization import ops  # noqa: F401  (registers the operators)
from lightning_qat.quantization.attach import quantized_networks
from lightning_qat.quantization.exported import export_program
from lightning_qat.quantization.network import Quantization


def lower(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic: Literal["batch", "size"] = "batch",
) -> ExportedProgram:
    """Export ``module``, with the operators of ``ops.py`` in its quantized networks.

    Args:
        module: a quantized network, or a module around quantized networks, on the CPU.
        args, kwargs: an example of its inputs.
        dynamic: ``batch``: any number of samples; ``size``: any height and width, too.

    Returns:
        The program. Constants are folded; weights are int8 and biases are int32.

    Raises:
        UserError: there is no quantized network, or it has no ranges yet.
    """
    networks = quantized_networks(module)
    if not networks or not all(x.is_ready for x in networks):
        raise UserError("this network has no scales yet: train or calibrate it first.")
    modes = {x: x.training for x in module.modules()}
    module.eval()
    try:
        for quantization in networks:
            quantization.numbers = _numbers(quantization)
        with torch.no_grad():
            output = module(*args, **(kwargs or {}))  # keeps the integers of each layer
        _register(output)
        return export_program(module, args, kwargs or {}, dynamic)
    finally:
        for quantization in networks:
            quantization.numbers = None
            quantization.lowered = {}
        for x, training in modes.items():
            x.training = training


def _register(output: Any) -> None:
    """Let torch.export flatten the dataclasses in ``output``."""
    for value in output if isinstance(output, list | tuple) else [output]:
        if dataclasses.is_dataclass(value) and type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))


def _numbers(quantization: Quantization) -> dict[str, tuple[float, int]]:
    numbers = {}
    for name in quantization.plan.activations:
        scale, zero_point = quantization.activation(name).qparams()
        numbers[name] = (float(scale), int(zero_point))
    return numbers
