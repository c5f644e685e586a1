"""The operators of a lowered network: quantize, and two kinds of dequantize.

A lowered network is an exported graph. Each layer in it stands between these operators::

    x = dequantize(...)
    conv2d(x, dequantize_per_channel(weight), dequantize_per_channel(bias)) -> quantize

They have the meaning of ONNX's QuantizeLinear and DequantizeLinear. torch's own operators for this
are part of torch.ao, and a later version of torch may not have it.
"""

import torch
from torch import Tensor

NAMESPACE = "lightning_qat"


@torch.library.custom_op(f"{NAMESPACE}::quantize", mutates_args=())
def quantize(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, signed: bool
) -> Tensor:
    """Return ``clamp(round(x / scale) + zero_point, quant_min, quant_max)``.

    Args:
        x: any shape, float32.
        scale, zero_point: values for the whole tensor.
        quant_min, quant_max: the limits, within 0..255, or within -128..127 if ``signed``.
        signed: True = return int8, False = return uint8.
    """
    integers = torch.round(x / scale).add_(zero_point).clamp_(quant_min, quant_max)
    return integers.to(torch.int8 if signed else torch.uint8)


@torch.library.custom_op(f"{NAMESPACE}::dequantize", mutates_args=())
def dequantize(integers: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return ``(integers - zero_point) * scale``, float32, for uint8 or int8 of any shape."""
    return (integers.float() - zero_point) * scale


@torch.library.custom_op(f"{NAMESPACE}::dequantize_per_channel", mutates_args=())
def dequantize_per_channel(integers: Tensor, scale: Tensor, axis: int, layer: str) -> Tensor:
    """Return ``integers * scale``, float32, with a scale for each index of ``axis``.

    Args:
        integers: weights in int8, or a bias in int32. Their zero point is 0.
        scale: one value for each index of ``axis``, float32.
        axis: the axis of the output channels.
        layer: the name of their layer.
    """
    shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
    return integers.float() * scale.reshape(shape)


@quantize.register_fake
def _(x, scale, zero_point, quant_min, quant_max, signed):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)


@dequantize.register_fake
def _(integers, scale, zero_point):  # type: ignore[no-untyped-def]
    return torch.empty_like(integers, dtype=torch.float32)


@dequantize_per_channel.register_fake
def _(integers, scale, axis, layer):  # type: ignore[no-untyped-def]
    return torch.empty_like(integers, dtype=torch.float32)
