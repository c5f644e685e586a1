"""The bytes of a network whose weights are packed at their bits, which torch's files do not do."""

from typing import Any

from torch import nn
from torch.ao import quantization as tq

_WORD = 4  # bytes of a scale (float32), of a bias (int32), of what stays in float (float32)


def packed_bytes(fake_quantised: nn.Module) -> int:
    """The least that the parameters need: 4-bit weights take half a byte.

    Each layer starts at a whole byte. Batch-norm is folded into its layer, which then has a bias.
    Zero points, at most one a channel, and the scales of activations, one a layer, are left out.

    Args:
        fake_quantised: as ``prepare_qat`` made it, with scales known.
    """
    layers = [module for module in fake_quantised.modules() if hasattr(module, "weight_fake_quant")]
    quantisers = [x for x in fake_quantised.modules() if isinstance(x, tq.FakeQuantizeBase)]
    counted = {id(x) for module in (*layers, *quantisers) for x in module.parameters()}
    in_float = (x.numel() for x in fake_quantised.parameters() if id(x) not in counted)
    return sum(map(_layer_bytes, layers)) + _WORD * sum(in_float)


def weight_bits(fake_quant: Any) -> int:
    """Bits that an integer from ``quant_min`` to ``quant_max`` takes."""
    return (fake_quant.quant_max - fake_quant.quant_min).bit_length()


def _layer_bytes(layer: Any) -> int:
    fake_quant = layer.weight_fake_quant
    packed = -(-layer.weight.numel() * weight_bits(fake_quant) // 8)
    bn = getattr(layer, "bn", None)
    bias = layer.bias if bn is None else bn.bias
    biases = 0 if bias is None else bias.numel()
    return packed + _WORD * (fake_quant.scale.numel() + biases)
