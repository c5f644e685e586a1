"""Measure the noise that quantization adds to each layer, to find layers to keep in float."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.arithmetic import Quantize
from lightning_qat.quantization.attach import quantization_of
from lightning_qat.quantization.calls import CLAMPS
from lightning_qat.quantization.fake_quantize import along
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.prepare import copy_network

_IMAGES_AT_ONCE = 32  # each batch needs memory for a few copies of a layer's output
_KINDS = {"relu": "ReLU", "relu6": "ReLU6"}


def layer_damage(net: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Compare every quantized layer with the same layer in float, worst first.

    The float reference is the *trained* network without rounding. It is not the FP32 network that
    the training started from, because training has changed those weights. SQNR is the ratio of
    signal to quantization noise; the powers are summed over all images. One more bit adds 6 dB.
    Layers are compared after their batch-norm and their ReLU.

    Args:
        net: a quantized network with known scales, on the CPU. It is not changed.
        images: input of ``net``, float32, with the batch as the first dimension.

    Returns:
        One row for each layer and sum, lowest ``own_sqnr_db`` first. A layer that is called more
            than once has one row for all its calls. Layers in float have no row.

        - ``name``: its name in ``overrides``.
        - ``kind``: such as ``Conv2d + ReLU``; batch-norm is folded and not named.
        - ``sqnr_db``: SQNR of its output in the INT8 model, with the errors of all earlier layers.
        - ``own_sqnr_db``: SQNR with the earlier layers in float, and its weights and output
            rounded; its input is rounded, too, if no earlier layer does it. Both are None if there
            is no noise or no signal.
        - ``weight_min``, ``weight_max``: with batch-norm folded in; None without weights.
        - ``activation_min``, ``activation_max``: range of its output in float.
        - ``clipped``: share, 0..1, of its float outputs that are more than half a step outside the
            range of its integers; 0 if its output stays in float.

    Raises:
        UserError: ``net`` is not quantized, or has no scales yet.
    """
    net = copy_network(net).eval()
    quantization = quantization_of(net)
    if quantization is None or not quantization.is_ready:
        raise UserError("layer_damage needs a network that has been trained or calibrated.")
    quantization.observe(False)
    damages: dict[str, _Damage] = {}
    for batch in images.split(_IMAGES_AT_ONCE):
        quantized = _Quantized(quantization, damages)
        quantization.run_in(quantized, batch.clone())
        comparison = _Comparison(quantization, quantized.ends, damages)
        quantization.run_in(comparison, batch.clone())
    return sorted((damage.row(name) for name, damage in damages.items()), key=_by_own_sqnr)


@dataclass
class _Damage:
    """Sums over all calls of a layer and all images."""

    kind: list[str] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    own_noise: float = 0.0
    weight_min: float | None = None
    weight_max: float | None = None
    activation_min: float = math.inf
    activation_max: float = -math.inf
    clipped: int = 0
    values: int = 0

    def add(self, expected: Tensor, alone: Tensor, quantized: Tensor) -> None:
        """Add one batch: outputs in float, with only this layer quantized, with all quantized."""
        self.signal += _power(expected)
        self.own_noise += _power(alone - expected)
        self.noise += _power(quantized - expected)
        low, high = (x.item() for x in expected.aminmax())
        self.activation_min = min(self.activation_min, low)
        self.activation_max = max(self.activation_max, high)
        self.values += expected.numel()

    def row(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "kind": " + ".join(self.kind),
            "sqnr_db": _decibels(self.signal, self.noise),
            "own_sqnr_db": _decibels(self.signal, self.own_noise),
            "weight_min": self.weight_min,
            "weight_max": self.weight_max,
            "activation_min": self.activation_min,
            "activation_max": self.activation_max,
            "clipped": self.clipped / self.values,
        }


class _Quantized(Quantize):
    """Run the quantized network, and keep the values at the ends of its chains."""

    def __init__(self, owner: Quantization, damages: dict[str, _Damage]) -> None:
        super().__init__(owner)
        self.damages = damages
        self.ends: dict[str, Tensor] = {}

    def call(self, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call(site, function, args, kwargs)
        if first := _ended(self.owner, site):
            self.ends[first] = output.clone()  # later functions may change it in place
        return output

    def _finish(self, layer: Any, site: str, factor: Tensor | None, *rest: Any) -> Tensor:
        """Store the range of the weight, with batch-norm folded in."""
        weight = layer.operands[1]
        fold = self._fold(layer.call, weight)
        if fold is None and factor is not None:
            fold = along(factor, weight.ndim, layer.call.axis)
        low, high = (weight if fold is None else weight * fold).aminmax()
        damage = self.damages.setdefault(layer.call.layer, _Damage())
        damage.weight_min, damage.weight_max = low.item(), high.item()
        return super()._finish(layer, site, factor, *rest)


class _Comparison(Quantize):
    """Run the network in float. Next to it, run each chain alone in its quantized form."""

    def __init__(
        self, owner: Quantization, quantized: dict[str, Tensor], damages: dict[str, _Damage]
    ) -> None:
        super().__init__(owner)
        self.quantized, self.damages = quantized, damages
        # id of a float value -> the value itself, which keeps the id unique, and its quantized
        # form.
        self.alone: dict[int, tuple[Tensor, Tensor]] = {}

    def call(self, site: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.owner.plan.calls.get(site)
        if call is None:
            return function(*args, **kwargs)
        if call.layer:
            damage = self.damages.setdefault(call.layer, _Damage())
            damage.kind = damage.kind or ["add" if call.kind == "sum" else _kind(function)]
            alone = self._alone(site, function, args, kwargs)
        else:
            value = args[0] if args else kwargs["input"]
            _, before = self.alone.pop(id(value), (value, value))
            others = {name: x for name, x in kwargs.items() if name != "input"}
            alone = self._alone(site, function, (before, *args[1:]), others)
        output = function(*args, **kwargs)
        if first := _ended(self.owner, site):
            clamp = _clamp(function, args, kwargs) if function in CLAMPS else ""
            self._compare(first, clamp, call.output, output, alone)
        else:
            self.alone[id(output)] = output, alone
        return output

    def _alone(self, site: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Round as in training, which does not round inputs that other layers have rounded."""
        self.owner.net.training = True
        try:
            return super().call(site, function, args, kwargs)
        finally:
            self.owner.net.training = False

    def _compare(
        self, first: str, clamp: str, quantizer: str, output: Tensor, alone: Tensor
    ) -> None:
        damage = self.damages[self.owner.plan.calls[first].layer]
        if clamp and len(damage.kind) == 1:
            damage.kind.append(clamp)
        damage.add(output, alone, self.quantized.pop(first))
        if quantizer:
            fake_quant = self.owner.activation(quantizer)
            scale, zero_point = fake_quant.qparams()
            lowest, highest = fake_quant.limits
            steps = output / scale + zero_point
            damage.clipped += int(((steps < lowest - 0.5) | (steps > highest + 0.5)).sum())


def _ended(owner: Quantization, site: str) -> str:
    """Return the first call of the chain that ends at ``site``, or "" if no chain ends there."""
    call = owner.plan.calls.get(site)
    if call is None or call.follows:
        return call.follows if call is not None else ""
    return site if call.layer and not call.steps else ""


def _kind(function: Any) -> str:
    name = function.__name__.rstrip("_")
    return _KINDS.get(name, "".join(part.capitalize() for part in name.split("_")))


def _clamp(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    limits = [*args[1:3], kwargs.get("min_val"), kwargs.get("max_val")]
    # torch's module ReLU6 calls hardtanh
    return "ReLU6" if {0.0, 6.0} <= set(limits) else _kind(function)


def _power(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item() ** 2


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal and noise else None


def _by_own_sqnr(row: dict[str, Any]) -> float:
    return math.inf if row["own_sqnr_db"] is None else row["own_sqnr_db"]
