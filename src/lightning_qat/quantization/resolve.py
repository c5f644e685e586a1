"""Which QConfig a name or an argument means, and whether it can be used here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.ao import quantization as tq

from lightning_qat.errors import UserError, checked_bool
from lightning_qat.quantization.fake_quantize import SwitchedFakeQuantize
from lightning_qat.quantization.qconfig import QCONFIGS


def resolve_qconfig(qconfig: str | tq.QConfig, allow_saturation: bool) -> tuple[tq.QConfig, str]:
    """The QConfig that ``qconfig`` is or names, and the quantised engine to convert for.

    Raises:
        UserError: unknown name, a QConfig that only observes, an engine that this build or CPU
            lacks, or activations too wide for this CPU's kernels and not ``allow_saturation``.
    """
    checked_bool("allow_saturation", allow_saturation)
    if isinstance(qconfig, str):
        if qconfig not in QCONFIGS:
            raise UserError(f"qconfig={qconfig!r} is unknown: choose one of {', '.join(QCONFIGS)}.")
        qconfig = QCONFIGS[qconfig]()
    if not isinstance(qconfig, tq.QConfig):
        raise UserError(
            f"qconfig must be one of {', '.join(QCONFIGS)} or a torch.ao.quantization.QConfig, "
            f"not a {type(qconfig).__name__}."
        )
    try:
        activation, weight = qconfig.activation(), qconfig.weight()
    except AssertionError as error:  # what torch says of ranges and schemes
        raise UserError(
            f"this QConfig cannot be made: {error}. Let quant_min and quant_max lie within the "
            "dtype: 0..255 for quint8, -128..127 for qint8."
        ) from error
    for role, fake_quant in (("activation", activation), ("weight", weight)):
        if not isinstance(fake_quant, tq.FakeQuantizeBase):
            raise UserError(
                f"the {role} of this QConfig is a {type(fake_quant).__name__}, which observes but "
                "does not fake-quantise, so training would not see any quantisation. Use a "
                "FakeQuantize, as torch.ao.quantization.get_default_qat_qconfig does "
                "(get_default_qconfig, without 'qat', is for calibration only)."
            )
    _refuse_without_kernel(activation, weight)
    engine = getattr(qconfig, "engine", torch.backends.quantized.engine)
    if engine not in torch.backends.quantized.supported_engines:
        raise UserError(
            f"the quantised engine {engine!r} does not exist in this build of torch on this CPU: "
            f"choose a qconfig for one of {', '.join(torch.backends.quantized.supported_engines)}."
        )
    if engine != "qnnpack" and not allow_saturation and not torch.cpu._is_vnni_supported():
        wide = getattr(qconfig, "wide", None)  # with few bits, some activations have 8
        observer = (wide.activation() if wide else activation).activation_post_process
        if observer.quant_max - observer.quant_min > 127:
            raise UserError(
                f"this qconfig uses 8-bit activations on {engine!r}, and this CPU has no VNNI: "
                "sums of two products would saturate in its kernels and cost accuracy. Use "
                "qconfig=x86, or allow_saturation=true to do it all the same."
            )
    return qconfig, engine


def _refuse_without_kernel(activation: Any, weight: Any) -> None:
    for role, fake_quant, dtype in (
        ("activation", activation, torch.quint8),
        ("weight", weight, torch.qint8),
    ):
        if fake_quant.dtype != dtype:
            raise UserError(
                f"the {role} of this QConfig is {fake_quant.dtype}, and torch's integer kernels "
                f"take {dtype} there: use that."
            )
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


def resolve_overrides(
    overrides: Mapping[Any, str | tq.QConfig | None], engine: str, allow_saturation: bool
) -> dict[Any, tq.QConfig | None]:
    """The QConfigs of single layers, by name or type; None = in float.

    Raises:
        UserError: one of them cannot be used, or belongs to another engine than the network's.
    """
    if not isinstance(overrides, Mapping):
        raise UserError(f"overrides={overrides!r}: set it to a mapping, such as {{'fc': None}}.")
    resolved: dict[Any, tq.QConfig | None] = {}
    for key, value in overrides.items():
        if not isinstance(key, str | type):
            raise UserError(f"overrides: {key!r} is neither the name of a layer nor a type.")
        resolved[key] = None
        if value is not None:
            resolved[key], own_engine = resolve_qconfig(value, allow_saturation)
            if own_engine != engine:
                raise UserError(
                    f"overrides: {key!r} is for the engine {own_engine!r}, the network for "
                    f"{engine!r}: an INT8 model has one engine."
                )
    return resolved


def activation_range(net: nn.Module) -> dict[str, Any]:
    """The highest integer that activations are mapped to, and why that one.

    Args:
        net: fake-quantised.

    Returns:
        ``quant_max`` (127 or 255), ``why`` in words, and whether sums ``saturate`` on this CPU.
    """
    observers = [
        module.activation_post_process
        for module in net.modules()
        if isinstance(module, tq.FusedMovingAvgObsFakeQuantize | SwitchedFakeQuantize)
        and module.dtype == torch.quint8
    ]
    highest = max((observer.quant_max for observer in observers), default=255)
    if highest <= 127:
        why = "sums of two products of such integers fit into 16 bits on every CPU"
        return {"quant_max": highest, "why": why, "saturates": False}
    vnni = torch.cpu._is_vnni_supported()
    why = "one bit more, for CPUs that sum in 32 bits: with VNNI, which this one has"
    return {"quant_max": highest, "why": why + ("" if vnni else " not"), "saturates": not vnni}


def describe(qconfig: tq.QConfig | Mapping[Any, Any] | None) -> str:
    """A qconfig, or a mapping to some, in words that are the same in every process."""
    if isinstance(qconfig, Mapping):
        words = {getattr(key, "__qualname__", key): describe(x) for key, x in qconfig.items()}
        return ", ".join(f"{key}: {word}" for key, word in sorted(words.items())) or "none"
    knobs = getattr(qconfig, "knobs", None)
    if knobs is None:
        return "float" if qconfig is None else str(qconfig)
    for name, make in QCONFIGS.items():
        if knobs == make().knobs:
            return name
    return ", ".join(f"{knob}={value}" for knob, value in knobs.items())
