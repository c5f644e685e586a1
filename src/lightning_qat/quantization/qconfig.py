"""The named quantisation configurations, all made by one constructor.

``conf/qconfig/README.md`` explains each knob of it. Weights are signed and symmetric, because every
integer kernel of torch wants that. Activations are unsigned. ``reduce_range`` maps them to 0..127
instead of 0..255: on x86 without VNNI, two 8-bit by 8-bit products are summed in 16 bits, which
0..255 overflows.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.ao import quantization as tq

from lightning_qat.errors import UserError, checked_bool, checked_float, checked_int
from lightning_qat.quantization.fake_quantize import (
    KernelRangeFakeQuantize,
    MovingAverageObserver,
    SymmetricFakeQuantize,
)
from lightning_qat.quantization.learned_scale import LearnedScaleFakeQuantize

Engine = Literal["x86", "fbgemm", "onednn", "qnnpack"]
Observer = Literal["moving_average", "min_max", "histogram"]
Scales = Literal["observed", "power_of_two", "learned", "learned_offset"]


class KernelQConfig(tq.QConfig):
    """A QConfig that knows where its integer model runs.

    Attributes:
        engine: which of torch's quantised engines that is.
        knobs: the arguments of ``make_qconfig``, defaults included.
        wide: the same with 8 bits, for what no layer's weights are multiplied with, and for the
            ends of the network where ``wide_ends`` says so; None where this one has 8 bits.
    """

    engine: str
    knobs: dict[str, Any]
    wide: "KernelQConfig | None"
    of_input: "KernelQConfig | None" = None
    """Of what comes into the network, where that is another."""


def make_qconfig(
    engine: Engine = "x86",
    weight_bits: int = 8,
    activation_bits: int = 8,
    per_channel: bool = True,
    symmetric: bool = False,
    reduce_range: bool = True,
    observer: Observer = "moving_average",
    averaging_constant: float = 0.01,
    scales: Scales = "observed",
    wide_ends: bool = True,
) -> KernelQConfig:
    """The constructor behind every named qconfig.

    Args:
        engine: of torch's kernels.
        weight_bits: 2 to 8, signed, in int8 containers.
        activation_bits: 2 to 8, unsigned, in uint8 containers, of what a layer's weights are
            multiplied with. Below 8, a clamp behind the kernel, which clips at 255, ends the range.
        per_channel: one weight scale for each output channel, else one for the tensor.
        symmetric: activations have their zero point in the middle, else where 0 falls.
        reduce_range: activations of 8 bits are mapped to 0..127, so that sums fit on every CPU.
        observer: of activations.
        averaging_constant: what one batch counts in ``moving_average``.
        scales: ``learned`` is LSQ, ``learned_offset`` LSQ+.
        wide_ends: with fewer bits, the first and the last layer keep 8.

    Raises:
        UserError: a value that does not exist.
    """
    knobs = dict(locals())
    for name, values in (("engine", Engine), ("observer", Observer), ("scales", Scales)):
        if knobs[name] not in get_args(values):
            allowed = ", ".join(get_args(values))
            raise UserError(f"qconfig.{name}={knobs[name]!r} does not exist: choose {allowed}.")
    for name in ("weight_bits", "activation_bits"):
        checked_int(f"qconfig.{name}", knobs[name], lowest=2, highest=8)
    for name in ("per_channel", "symmetric", "reduce_range", "wide_ends"):
        checked_bool(f"qconfig.{name}", knobs[name])
    if not 0 < checked_float("qconfig.averaging_constant", averaging_constant, lowest=0) <= 1:
        raise UserError(
            f"qconfig.averaging_constant={averaging_constant}: set it above 0, up to 1."
        )
    # everywhere with_args, not functools.partial, which prepare_qat would leave on the CPU
    observers = {
        "moving_average": MovingAverageObserver.with_args(averaging_constant=averaging_constant),
        "min_max": tq.MinMaxObserver,
        "histogram": tq.HistogramObserver,
    }
    activation = {
        "observer": observers[observer],
        "quant_min": 0,
        "quant_max": 2 ** min(activation_bits, 7 if reduce_range else 8) - 1,
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    }
    weight = {
        "observer": tq.PerChannelMinMaxObserver if per_channel else tq.MinMaxObserver,
        "quant_min": -(2 ** (weight_bits - 1)),
        "quant_max": 2 ** (weight_bits - 1) - 1,
        "dtype": torch.qint8,
        "qscheme": torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
    }
    learned = scales in ("learned", "learned_offset")
    if learned:
        activation["learns_offset"] = scales == "learned_offset"
        made = KernelQConfig(
            activation=LearnedScaleFakeQuantize.with_args(**activation),
            weight=LearnedScaleFakeQuantize.with_args(**weight),
        )
    else:
        power_of_two = scales == "power_of_two"
        activation |= {"clip": activation_bits < 8, "power_of_two": power_of_two}
        made = KernelQConfig(
            activation=KernelRangeFakeQuantize.with_args(**activation),
            weight=SymmetricFakeQuantize.with_args(**weight, power_of_two=power_of_two),
        )
    made.engine, made.knobs, made.wide = engine, knobs, None
    if min(weight_bits, activation_bits) < 8:
        eight = {"weight_bits": 8, "activation_bits": 8}
        made.wide = make_qconfig(**knobs | eight | ({"scales": "observed"} if learned else {}))
    return made


def of_an_end(qconfig: tq.QConfig, is_last: bool) -> tq.QConfig:
    """What ``qconfig`` is for the first or the last layer of a network."""
    wide = getattr(qconfig, "wide", None)
    if not isinstance(qconfig, KernelQConfig) or wide is None or not qconfig.knobs["wide_ends"]:
        return qconfig
    if is_last:
        return wide
    first = KernelQConfig(activation=qconfig.activation, weight=wide.weight)
    first.engine, first.knobs, first.wide = qconfig.engine, qconfig.knobs, wide
    first.of_input = wide
    return first


def x86() -> KernelQConfig:
    """torch's default on x86, which picks fbgemm or oneDNN per layer: 7-bit activations."""
    return make_qconfig()


def fbgemm() -> KernelQConfig:
    """The same integers as ``x86``, all of them through fbgemm's kernels."""
    return make_qconfig("fbgemm")


def onednn() -> KernelQConfig:
    """Full 8-bit activations on oneDNN: one bit more, and safe only on a CPU with VNNI."""
    return make_qconfig("onednn", reduce_range=False)


def qnnpack() -> KernelQConfig:
    """torch's kernels for ARM, which also run on x86: one scale for a whole weight tensor."""
    return make_qconfig("qnnpack", reduce_range=False, per_channel=False)


def per_tensor_symmetric() -> KernelQConfig:
    """The plainest scheme: one scale a tensor, and the zero point in the middle of the range."""
    return make_qconfig(per_channel=False, symmetric=True)


def per_tensor_affine() -> KernelQConfig:
    """One scale a tensor; activations use their range from its lowest to its highest value."""
    return make_qconfig(per_channel=False)


def per_channel_symmetric() -> KernelQConfig:
    """One weight scale a channel; the zero point of activations in the middle of the range."""
    return make_qconfig(symmetric=True)


def histogram_ptq() -> KernelQConfig:
    """Ranges that cut outliers off where that costs least, by histograms: for ``stage=ptq``."""
    return make_qconfig(observer="histogram")


def power_of_two() -> KernelQConfig:
    """Scales that are powers of two, for hardware that shifts instead of multiplying."""
    return make_qconfig(scales="power_of_two")


def lsq() -> KernelQConfig:
    """8 bits with learned scales (Esser et al., "Learned Step Size Quantization", 2020)."""
    return make_qconfig(scales="learned")


def lsq_plus() -> KernelQConfig:
    """Learned offsets of activations as well (Bhalgat et al., "LSQ+", 2020)."""
    return make_qconfig(scales="learned_offset")


def w4a8() -> KernelQConfig:
    """4-bit weights."""
    return make_qconfig(weight_bits=4)


def w4a4() -> KernelQConfig:
    """4-bit weights and activations."""
    return make_qconfig(weight_bits=4, activation_bits=4)


def w3a3() -> KernelQConfig:
    """3-bit weights and activations."""
    return make_qconfig(weight_bits=3, activation_bits=3)


def w2a4() -> KernelQConfig:
    """Ternary weights, 4-bit activations."""
    return make_qconfig(weight_bits=2, activation_bits=4)


def w2a2() -> KernelQConfig:
    """Ternary weights, 2-bit activations."""
    return make_qconfig(weight_bits=2, activation_bits=2)


def w4a8_lsq() -> KernelQConfig:
    """``w4a8`` with learned scales."""
    return make_qconfig(weight_bits=4, scales="learned")


def w4a4_lsq() -> KernelQConfig:
    """``w4a4`` with learned scales."""
    return make_qconfig(weight_bits=4, activation_bits=4, scales="learned")


def w3a3_lsq() -> KernelQConfig:
    """``w3a3`` with learned scales."""
    return make_qconfig(weight_bits=3, activation_bits=3, scales="learned")


def w2a4_lsq() -> KernelQConfig:
    """2-bit weights, 4-bit activations, learned scales."""
    return make_qconfig(weight_bits=2, activation_bits=4, scales="learned")


def w2a2_lsq() -> KernelQConfig:
    """2-bit weights and activations, learned scales."""
    return make_qconfig(weight_bits=2, activation_bits=2, scales="learned")


QCONFIGS: dict[str, Callable[[], KernelQConfig]] = {
    function.__name__: function
    for function in (
        x86, fbgemm, onednn, qnnpack,
        per_tensor_symmetric, per_tensor_affine, per_channel_symmetric,
        histogram_ptq, power_of_two, lsq, lsq_plus,
        w4a8, w4a4, w3a3, w2a4, w2a2,
        w4a8_lsq, w4a4_lsq, w3a3_lsq, w2a4_lsq, w2a2_lsq,
    )
}  # fmt: skip
