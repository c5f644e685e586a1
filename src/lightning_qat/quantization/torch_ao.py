"""Modules of torch.ao with integer kernels, and conversion of QConfigs of torch.ao.

No other file of the core imports torch.ao, because a later version of torch may not have it.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from lightning_qat.errors import UserError
from lightning_qat.quantization.qconfig import Engine, Observer, QConfig
from lightning_qat.quantization.torch_layers import Layer
from lightning_qat.quantization.torch_model import quantized_engine


class FloatOutputLinear(nnq.Linear):
    """A linear layer that takes integers, sums integers, and returns float32 without rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """Take a quantized tensor (..., inputs), of torch.quint8; return (..., outputs)."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x.dequantize(), x.q_scale(), x.q_zero_point(), self._packed_params._packed_params
        )


_MODULES: dict[str, Any] = {
    "linear": (nnq.Linear, nniq.LinearReLU),
    "conv1d": (nnq.Conv1d, nniq.ConvReLU1d),
    "conv2d": (nnq.Conv2d, nniq.ConvReLU2d),
    "conv3d": (nnq.Conv3d, nniq.ConvReLU3d),
    "conv_transpose1d": (nnq.ConvTranspose1d, None),
    "conv_transpose2d": (nnq.ConvTranspose2d, None),
    "conv_transpose3d": (nnq.ConvTranspose3d, None),
}


def has_relu(kind: str) -> bool:
    """Return True if the kernel for ``kind`` can end in a ReLU."""
    return _MODULES[kind][1] is not None


def has_float_output(kind: str, engine: str) -> bool:
    """Return True if the kernel for ``kind`` can return its sums in float32, without rounding."""
    return kind == "linear" and engine in ("x86", "fbgemm")


def integer_module(
    layer: Layer, relu: bool, output: tuple[float, int] | None, engine: str
) -> nn.Module:
    """Return torch's module with the integer kernel for ``layer``.

    Args:
        layer: a layer without ``limitation``.
        relu: True = end in a ReLU.
        output: scale and zero point of the output; None = float32 output.
        engine: the quantized engine of torch.
    """
    rows, columns = layer.integers.shape[:2]
    has_bias = layer.bias is not None
    with quantized_engine(engine):
        if layer.kind == "linear":
            make = FloatOutputLinear if output is None else _MODULES["linear"][relu]
            module = make(columns, rows, has_bias)
        else:
            settings = {
                "kernel_size": layer.kernel_size, "stride": layer.stride,
                "padding": layer.padding, "dilation": layer.dilation,
                "groups": layer.groups, "bias": has_bias,
            }  # fmt: skip
            channels = (columns * layer.groups, rows)
            if layer.is_transposed:
                settings["output_padding"] = layer.output_padding
                channels = (rows, columns * layer.groups)
            module = _MODULES[layer.kind][relu](*channels, **settings)
        module.set_weight_bias(layer.quantized_weight(), layer.bias)
    if output is not None:
        module.scale, module.zero_point = output
    return module.eval()


_OBSERVERS: dict[Any, Observer] = {
    tq.MovingAverageMinMaxObserver: "moving_average",
    tq.MinMaxObserver: "min_max",
    tq.HistogramObserver: "histogram",
}


def from_torch_qconfig(qconfig: tq.QConfig) -> QConfig:
    """Return the scheme with the same meaning as a QConfig of torch.ao.

    Raises:
        UserError: the QConfig only observes, or no integer kernel supports it.
    """
    try:
        activation, weight = qconfig.activation(), qconfig.weight()
    except AssertionError as error:  # torch's message about ranges and schemes
        raise UserError(
            f"this QConfig cannot be made: {error}. Let quant_min and quant_max lie within the "
            "dtype: 0..255 for quint8, -128..127 for qint8."
        ) from error
    for role, fake_quant, dtype in (
        ("activation", activation, torch.quint8),
        ("weight", weight, torch.qint8),
    ):
        _refuse(role, fake_quant, dtype)
    per_channel = _schemes(activation, weight)
    observer: Any = activation.activation_post_process
    if type(observer) not in _OBSERVERS:
        raise UserError(
            f"the activation of this QConfig has a {type(observer).__name__}: use one of "
            f"{', '.join(kind.__name__ for kind in _OBSERVERS)}."
        )
    quant_range = observer.quant_max - observer.quant_min
    return QConfig(
        engine=cast(Engine, torch.backends.quantized.engine),
        weight_bits=(weight.quant_max - weight.quant_min).bit_length(),
        activation_bits=quant_range.bit_length(),  # torch's default has 7: 0..127
        reduce_range=False,
        per_channel=per_channel,
        symmetric=activation.qscheme == torch.per_tensor_symmetric,
        observer=_OBSERVERS[type(observer)],
        averaging_constant=getattr(observer, "averaging_constant", 0.01),
        wide_ends=False,
    )


def _refuse(role: str, fake_quant: Any, dtype: torch.dtype) -> None:
    if not isinstance(fake_quant, tq.FakeQuantizeBase):
        raise UserError(
            f"the {role} of this QConfig is a {type(fake_quant).__name__}, which observes but "
            "does not fake-quantize, so training would not see any quantization. Use a "
            "FakeQuantize, as torch.ao.quantization.get_default_qat_qconfig does "
            "(get_default_qconfig, without 'qat', is for calibration only)."
        )
    if type(fake_quant) not in (tq.FakeQuantize, tq.FusedMovingAvgObsFakeQuantize):
        raise UserError(
            f"the {role} of this QConfig is a {type(fake_quant).__name__}, which has no "
            "counterpart here: use torch.ao.quantization.FakeQuantize or "
            "FusedMovingAvgObsFakeQuantize, or the name of one of our qconfigs."
        )
    if fake_quant.dtype != dtype:
        raise UserError(
            f"the {role} of this QConfig is {fake_quant.dtype}, and torch's integer kernels "
            f"take {dtype} there: use that."
        )


def _schemes(activation: Any, weight: Any) -> bool:
    """Check the schemes. Return True if weights have a scale for each channel."""
    schemes = (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if activation.qscheme not in schemes:
        raise UserError(
            f"the activation of this QConfig is {activation.qscheme}, for which there is no "
            "integer kernel: activations have one scale a tensor (torch.per_tensor_affine)."
        )
    per_channel = weight.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
    if weight.qscheme not in schemes and not (per_channel and weight.ch_axis == 0):
        raise UserError(
            f"the weight of this QConfig is {weight.qscheme} on axis {weight.ch_axis}, for which "
            "there is no integer kernel: weights have one scale a tensor, or one for each output "
            "channel (torch.per_channel_symmetric, ch_axis=0)."
        )
    return per_channel
