"""Compute the size of a network with packed weights, and the range of its activations."""

import operator
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.attach import quantization_of
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.qconfig import fits_16_bits, saturates

_WORD = 4  # bytes of a scale (float32), a bias (int32), a float parameter (float32)


def packed_bytes(net: nn.Module) -> int:
    """Return the minimum bytes of the parameters: a 4-bit weight takes half a byte.

    Each weight tensor starts at a whole byte. Batch-norm is folded into its layer, which then has a
    bias. The scales of activations, one per layer, are not counted.

    Args:
        net: a quantized network with known scales.
    """
    quantization = _quantization(net)
    weights = quantization.plan.weights
    total = 0
    for name, (qconfig, *_) in weights.items():
        values = operator.attrgetter(name)(net).numel()
        total += -(-values * qconfig.weight_bits // 8)
        total += _WORD * quantization.weight(name).qparams()[0].numel()
    folded = _folded(quantization)
    for name, parameter in net.named_parameters():
        if name not in folded and not any(_belongs_to(weight, name) for weight in weights):
            total += _WORD * parameter.numel()
    return total


def activation_range(net: nn.Module) -> dict[str, Any]:
    """Return the range of the activations of ``net``, and the reason for it.

    Returns:
        ``quant_min``, ``quant_max``, ``why`` in words, and ``saturates``: True if sums
            overflow on this CPU.
    """
    plan = _quantization(net).plan
    low, high = max((q.activation_range for q in plan.activations.values()), key=lambda x: x[1])
    limits = {"quant_min": low, "quant_max": high}
    schemes = [scheme for scheme, *_ in plan.weights.values()]
    if all(map(fits_16_bits, schemes)):
        largest = max(q.weight_limits[1] for q in schemes)
        why = f"with weights up to {largest}, sums of two products fit into 16 bits on every CPU"
        return limits | {"why": why, "saturates": False}
    has = "has" if torch.cpu._is_vnni_supported() else "does not have"
    why = f"with weights of at most 127, sums require a CPU with VNNI, which this one {has}"
    return limits | {"why": why, "saturates": any(map(saturates, schemes))}


def _quantization(net: nn.Module) -> Quantization:
    quantization = quantization_of(net)
    assert quantization is not None, "a quantized network"
    return quantization


def _folded(quantization: Quantization) -> set[str]:
    """Return the names of the parameters that are removed when batch-norm is folded."""
    names = set()
    for call in quantization.plan.calls.values():
        if call.norm:
            batch_norm = call.norm.rpartition("/")[0]
            names |= {f"{batch_norm}.weight", f"{call.layer}.bias"}
    return names


def _belongs_to(weight: str, parameter: str) -> bool:
    """Return True if ``parameter`` is ``weight``, or is parametrized to compute ``weight``."""
    layer, _, last = weight.rpartition(".")
    prefix = f"{layer}." if layer else ""
    parametrized = f"{prefix}parametrizations.{last}."
    return parameter == weight or parameter.startswith((f"{weight}_", parametrized))
