"""The named quantisation configurations, and what makes one usable.

Weights are signed 8-bit and symmetric in all of them (every integer kernel of torch wants that).
Activations are unsigned 8-bit. ``reduce_range`` maps them to 0..127 instead of 0..255: on x86
without VNNI, two 8-bit by 8-bit products are summed in 16 bits, which 0..255 overflows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.ao import quantization as tq

from lightning_qat.errors import UserError, checked_bool
from lightning_qat.quantization.fake_quantize import (
    KernelRangeFakeQuantize,
    MovingAverageObserver,
    SymmetricFakeQuantize,
)


class KernelQConfig(tq.QConfig):
    """A QConfig that knows which of torch's quantised engines its integer model runs on."""

    engine: str


def _qconfig(
    engine: str, *, reduce_range: bool, weight_per_channel: bool, symmetric: bool = False
) -> KernelQConfig:
    # with_args, not functools.partial: prepare_qat moves only the former to the model's device
    weight_observer = tq.PerChannelMinMaxObserver if weight_per_channel else tq.MinMaxObserver
    qconfig = KernelQConfig(
        activation=KernelRangeFakeQuantize.with_args(
            observer=MovingAverageObserver,
            quant_min=0,
            quant_max=127 if reduce_range else 255,
            dtype=torch.quint8,
            qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        ),
        weight=SymmetricFakeQuantize.with_args(
            observer=weight_observer,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric
            if weight_per_channel
            else torch.per_tensor_symmetric,
        ),
    )
    qconfig.engine = engine
    return qconfig


def x86() -> KernelQConfig:
    """torch's default on x86, which picks fbgemm or oneDNN per layer: 7-bit activations."""
    return _qconfig("x86", reduce_range=True, weight_per_channel=True)


def fbgemm() -> KernelQConfig:
    """The same integers as ``x86``, all of them through fbgemm's kernels."""
    return _qconfig("fbgemm", reduce_range=True, weight_per_channel=True)


def onednn() -> KernelQConfig:
    """Full 8-bit activations on oneDNN: one bit more, and safe only on a CPU with VNNI."""
    return _qconfig("onednn", reduce_range=False, weight_per_channel=True)


def qnnpack() -> KernelQConfig:
    """torch's kernels for ARM, which also run on x86: one scale for a whole weight tensor."""
    return _qconfig("qnnpack", reduce_range=False, weight_per_channel=False)


def per_tensor_symmetric() -> KernelQConfig:
    """The plainest scheme: one scale a tensor, and the zero point in the middle of the range."""
    return _qconfig("x86", reduce_range=True, weight_per_channel=False, symmetric=True)


QCONFIGS: dict[str, Callable[[], KernelQConfig]] = {
    function.__name__: function for function in (x86, fbgemm, onednn, qnnpack, per_tensor_symmetric)
}


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
    activation = qconfig.activation()
    for role, fake_quant in (("activation", activation), ("weight", qconfig.weight())):
        if not isinstance(fake_quant, tq.FakeQuantizeBase):
            raise UserError(
                f"the {role} of this QConfig is a {type(fake_quant).__name__}, which observes but "
                "does not fake-quantise, so training would not see any quantisation. Use a "
                "FakeQuantize, as torch.ao.quantization.get_default_qat_qconfig does "
                "(get_default_qconfig, without 'qat', is for calibration only)."
            )
    engine = getattr(qconfig, "engine", torch.backends.quantized.engine)
    if engine not in torch.backends.quantized.supported_engines:
        raise UserError(
            f"the quantised engine {engine!r} does not exist in this build of torch on this CPU: "
            f"choose a qconfig for one of {', '.join(torch.backends.quantized.supported_engines)}."
        )
    if engine != "qnnpack" and not allow_saturation and not torch.cpu._is_vnni_supported():
        observer = activation.activation_post_process
        if observer.quant_max - observer.quant_min > 127:
            raise UserError(
                f"this qconfig uses 8-bit activations on {engine!r}, and this CPU has no VNNI: "
                "sums of two products would saturate in its kernels and cost accuracy. Use "
                "qconfig=x86, or allow_saturation=true to do it all the same."
            )
    return qconfig, engine


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
        if isinstance(module, tq.FusedMovingAvgObsFakeQuantize | KernelRangeFakeQuantize)
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
    for name, make in QCONFIGS.items():
        if str(qconfig) == str(make()) and getattr(qconfig, "engine", None) == make().engine:
            return name
    return "float" if qconfig is None else str(qconfig)
