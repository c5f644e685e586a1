"""The named quantization schemes: one row of a table for each scheme.

``conf/qconfig/README.md`` explains the fields. Weights are signed and symmetric, because every
integer kernel requires that. ``reduce_range`` leaves out one bit of 8-bit weights: CPUs without
VNNI add two products in 16 bits, where 2 x 255 x 127 overflows, but 2 x 255 x 63 does not.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.utilities import rank_zero_warn

from lightning_qat.errors import UserError, checked_bool, checked_float, checked_int

Engine = Literal["x86", "fbgemm", "onednn", "qnnpack"]
Observer = Literal["moving_average", "min_max", "histogram"]
Scales = Literal["observed", "power_of_two", "learned", "learned_offset"]


@dataclass(frozen=True)
class QConfig:
    """A quantization scheme.

    Args:
        engine: the quantized engine of torch for the INT8 model.
        weight_bits: 2 to 8, signed, stored in int8.
        activation_bits: 2 to 8, for the inputs of layers. Other activations have 8 bits.
        per_channel: True = one weight scale for each output channel. False = one for the tensor.
        symmetric: True = the zero point of activations is the middle of the range. False = the
            observed range sets the zero point.
        reduce_range: weights of 8 bits stay within -63..63, so that sums fit on every CPU.
        signed: True = activations are int8 with zero point 0. False = activations are uint8.
        observer: observer of the activations.
        averaging_constant: the weight of one batch in ``moving_average``.
        scales: ``learned`` is LSQ, ``learned_offset`` is LSQ+.
        wide_ends: with fewer bits, the first and the last layer keep 8 bits.

    Raises:
        UserError: a value is not permitted.
    """

    engine: Engine = "x86"
    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    symmetric: bool = False
    reduce_range: bool = True
    signed: bool = False
    observer: Observer = "moving_average"
    averaging_constant: float = 0.01
    scales: Scales = "observed"
    wide_ends: bool = True

    def __post_init__(self) -> None:
        for name, values in (("engine", Engine), ("observer", Observer), ("scales", Scales)):
            if getattr(self, name) not in get_args(values):
                raise UserError(
                    f"qconfig.{name}={getattr(self, name)!r} does not exist: choose "
                    f"{', '.join(get_args(values))}."
                )
        for name in ("weight_bits", "activation_bits"):
            checked_int(f"qconfig.{name}", getattr(self, name), lowest=2, highest=8)
        for name in ("per_channel", "symmetric", "reduce_range", "signed", "wide_ends"):
            checked_bool(f"qconfig.{name}", getattr(self, name))
        constant = checked_float("qconfig.averaging_constant", self.averaging_constant, lowest=0)
        if not 0 < constant <= 1:
            raise UserError(f"qconfig.averaging_constant={constant}: set it above 0, up to 1.")

    @property
    def is_learned(self) -> bool:
        """True if training learns the scales."""
        return self.scales in ("learned", "learned_offset")

    @property
    def wide(self) -> "QConfig":
        """The same scheme with 8 bits. Learned scales of fewer bits become observed scales."""
        if min(self.weight_bits, self.activation_bits) == 8:
            return self
        scales = "observed" if self.is_learned else self.scales
        return dataclasses.replace(self, weight_bits=8, activation_bits=8, scales=scales)

    @property
    def activation_range(self) -> tuple[int, int]:
        """The integers that the lowest and the highest observed activation are mapped to."""
        if self.signed:
            highest = 2 ** (self.activation_bits - 1) - 1
            return -highest, highest
        return 0, 2**self.activation_bits - 1

    @property
    def activation_limits(self) -> tuple[int, int]:
        """The integers at which activations are clipped: with 8 bits, the ends of the dtype."""
        is_signed_8 = self.signed and self.activation_bits == 8 and not self.is_learned
        return (-128, 127) if is_signed_8 else self.activation_range

    @property
    def weight_limits(self) -> tuple[int, int]:
        """The integers at which weights are clipped. With 8 bits, the limits are symmetric."""
        if self.weight_bits == 8:
            return (-63, 63) if self.reduce_range else (-127, 127)
        highest = 2 ** (self.weight_bits - 1) - 1
        return -highest - 1, highest


def _few_bits(weight: int, activation: int) -> dict[str, QConfig]:
    name = f"w{weight}a{activation}"
    plain = QConfig(weight_bits=weight, activation_bits=activation)
    return {name: plain, f"{name}_lsq": dataclasses.replace(plain, scales="learned")}


QCONFIGS: dict[str, QConfig] = {
    # torch's default on x86, with fbgemm or oneDNN for each layer: 7-bit activations
    "x86": QConfig(),
    # the same integers, but all layers use fbgemm
    "fbgemm": QConfig("fbgemm"),
    # weights with all 8 bits: safe only on a CPU with VNNI
    "onednn": QConfig("onednn", reduce_range=False),
    # torch's kernels for ARM: one scale for a weight tensor
    "qnnpack": QConfig("qnnpack", reduce_range=False, per_channel=False),
    # int8 with zero point 0, as TensorRT's documentation requires
    "tensorrt": QConfig(reduce_range=False, symmetric=True, signed=True),
    "per_tensor_symmetric": QConfig(per_channel=False, symmetric=True),
    "per_tensor_affine": QConfig(per_channel=False),
    "per_channel_symmetric": QConfig(symmetric=True),
    # ranges that cut off outliers with the least error: for stage=ptq
    "histogram_ptq": QConfig(observer="histogram"),
    # scales for hardware that shifts instead of multiplying
    "power_of_two": QConfig(scales="power_of_two"),
    # Esser et al., "Learned Step Size Quantization", 2020
    "lsq": QConfig(scales="learned"),
    # Bhalgat et al., "LSQ+", 2020: learned offsets of activations as well
    "lsq_plus": QConfig(scales="learned_offset"),
    **_few_bits(4, 8),
    **_few_bits(4, 4),
    **_few_bits(3, 3),
    **_few_bits(2, 4),
    **_few_bits(2, 2),
}


def named_qconfig(name: str) -> QConfig:
    """Return the scheme of this name.

    Raises:
        UserError: there is no such scheme.
    """
    if name not in QCONFIGS:
        raise UserError(f"qconfig={name!r} is unknown: choose one of {', '.join(QCONFIGS)}.")
    return QCONFIGS[name]


def resolve_qconfig(qconfig: Any, allow_saturation: bool) -> QConfig:
    """Return the scheme for ``qconfig``: a scheme, a name, or a QConfig of torch.

    Raises:
        UserError: ``qconfig`` is unknown; or it only observes; or this CPU or build of torch does
            not have its engine; or its activations are too wide for the kernels of this CPU and
            ``allow_saturation`` is False.
    """
    checked_bool("allow_saturation", allow_saturation)
    if isinstance(qconfig, str):
        qconfig = named_qconfig(qconfig)
    elif type(qconfig).__module__.startswith("torch.ao."):
        from lightning_qat.quantization.torch_ao import from_torch_qconfig

        qconfig = from_torch_qconfig(qconfig)
    if not isinstance(qconfig, QConfig):
        raise UserError(
            f"qconfig must be one of {', '.join(QCONFIGS)}, a lightning_qat.quantization.QConfig "
            f"or a torch.ao.quantization.QConfig, not a {type(qconfig).__name__}."
        )
    engines = torch.backends.quantized.supported_engines
    if qconfig.engine not in engines:
        raise UserError(
            f"the quantized engine {qconfig.engine!r} does not exist in this build of torch on "
            f"this CPU: choose a qconfig for one of {', '.join(engines)}."
        )
    if qconfig.engine != "qnnpack" and saturates(qconfig) and not allow_saturation:
        if not qconfig.signed:
            raise UserError(
                f"this qconfig uses all 8 bits on {qconfig.engine!r}, and this CPU has no "
                "VNNI: sums of two products would saturate in its kernels and cost accuracy. Use "
                "qconfig=x86, or set allow_saturation=true to accept this."
            )
        rank_zero_warn(
            "this qconfig is made for a GPU. This CPU has no VNNI, so its kernels saturate: the "
            "accuracy that is measured here can be lower than that of the GPU."
        )
    return qconfig


def saturates(qconfig: QConfig) -> bool:
    """Return True if sums of two products can overflow 16 bits in the kernels of this CPU."""
    schemes = [qconfig, qconfig.wide] if qconfig.wide_ends else [qconfig]
    return not all(map(fits_16_bits, schemes)) and not torch.cpu._is_vnni_supported()


def fits_16_bits(qconfig: QConfig) -> bool:
    """Return True if the sum of two products fits, as kernels require without VNNI."""
    low, high = qconfig.activation_range
    return 2 * (high - low) * qconfig.weight_limits[1] < 2**15


def resolve_overrides(
    overrides: Mapping[Any, Any], engine: str, allow_saturation: bool
) -> dict[Any, QConfig | None]:
    """Return the schemes of single layers, by name or type; None = in float.

    Raises:
        UserError: a scheme cannot be used, or its engine is not the engine of the network.
    """
    if not isinstance(overrides, Mapping):
        raise UserError(f"overrides={overrides!r}: set it to a mapping, such as {{'fc': None}}.")
    resolved: dict[Any, QConfig | None] = {}
    for key, value in overrides.items():
        if not isinstance(key, str | type):
            raise UserError(f"overrides: {key!r} is neither the name of a layer nor a type.")
        resolved[key] = None if value is None else resolve_qconfig(value, allow_saturation)
        own = resolved[key]
        if own is not None and own.engine != engine:
            raise UserError(
                f"overrides: {key!r} is for the engine {own.engine!r}, the network for "
                f"{engine!r}: an INT8 model has one engine."
            )
    return resolved


def describe(qconfig: QConfig) -> str:
    """Return the name of a scheme, or its fields if it has no name."""
    for name, named in QCONFIGS.items():
        if qconfig == named:
            return name
    return ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(qconfig).items())
