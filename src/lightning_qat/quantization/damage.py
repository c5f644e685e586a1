"""What quantisation does to each layer: which one to keep in float, if any."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq

from lightning_qat.quantization.convert import Int8Model, clip_name, quantised_engine
from lightning_qat.quantization.fake_quantize import integer_limits
from lightning_qat.quantization.functions import float_functional_of

_IMAGES_AT_ONCE = 32  # what a layer gives for them is held in memory a few times over

# Integer module, or method of a functional -> its short name; others keep theirs.
_KINDS = {
    "Quantize": "quantise",
    "ConvReLU1d": "Conv1d + ReLU",
    "ConvReLU2d": "Conv2d + ReLU",
    "ConvReLU3d": "Conv3d + ReLU",
    "LinearReLU": "Linear + ReLU",
    "BNReLU2d": "BatchNorm2d + ReLU",
    "BNReLU3d": "BatchNorm3d + ReLU",
    "add_relu": "add + ReLU",
}


def layer_damage(
    fake_quantised: nn.Module, int8: Int8Model, images: Tensor
) -> list[dict[str, Any]]:
    """Compare every integer layer with itself in float, worst first.

    The float reference is the *trained* network with its fake-quantisers off, not the FP32 network
    that training started from: its weights are others, so the two differ by what was learnt, too.
    SQNR, the ratio of signal to quantisation noise, is that of torch's numeric suite
    (``torch.ao.ns.fx.utils.compute_sqnr``), with the powers summed over all images. One bit more is
    worth 6 dB.

    Args:
        fake_quantised: on the CPU, as ``prepare_qat`` made it and training left it.
        int8: what ``convert`` made of it. Neither of the two is changed.
        images: what they take in, float32, the batch first.

    Returns:
        One row a layer, lowest ``own_sqnr_db`` first. What stays in float has none. A layer that is
        called more than once has one row, over all its calls.

        - ``name``: what ``overrides`` calls it. Rows of kind ``quantise`` are an exception: they
          are where floats become integers, and go when what reads them is kept in float.
        - ``kind``: such as ``Conv2d + ReLU``; batch-norm is folded and not named.
        - ``sqnr_db``: of its output in the INT8 model, with the errors of all layers before it.
        - ``own_sqnr_db``: with its input in float, and its weights and output rounded. Both are
          None where there is no noise, or no signal.
        - ``weight_min``, ``weight_max``: with batch-norm folded in; None where it has no weights.
        - ``activation_min``, ``activation_max``: of its float output, behind its activation.
        - ``clipped``: share, 0..1, of its float outputs that lie more than half a step outside of
          what its integers can say: 0..255 in the kernels, fewer with fewer bits.
    """
    net: Any = copy.deepcopy(fake_quantised).eval()
    net.apply(tq.disable_observer).apply(tq.disable_fake_quant)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # layers run twice on the same input
    layers = _integer_layers(net, int8)
    with torch.no_grad(), quantised_engine(int8.engine):
        for batch in images.split(_IMAGES_AT_ONCE):
            integers = _Integers(int8, {layer.in_int8 for layer in layers.values()})
            integers.run(batch)
            _Comparison(net, layers, integers.found).run(batch)
    damages = {layer.damage.name: layer.damage for layer in layers.values()}
    return sorted((damage.row() for damage in damages.values()), key=_by_own_sqnr)


@dataclass
class _Damage:
    """Sums over all calls and images."""

    name: str
    kind: str
    signal: float = 0.0
    noise: float = 0.0
    own_noise: float = 0.0
    weight_min: float | None = None
    weight_max: float | None = None
    activation_min: float = math.inf
    activation_max: float = -math.inf
    clipped: int = 0
    values: int = 0

    def see_weight(self, fake_quant: nn.Module, args: tuple[Tensor]) -> None:
        """A hook of the weight's fake-quantiser, which gets it with batch-norm folded in."""
        self.weight_min, self.weight_max = (x.item() for x in args[0].aminmax())

    def add(
        self, expected: Tensor, alone: Tensor, integers: Tensor, limits: tuple[int, int]
    ) -> None:
        """Count in one batch: float, only this layer quantised, all quantised."""
        self.signal += _power(expected)
        self.own_noise += _power(alone - expected)
        self.noise += _power(integers.dequantize() - expected)
        low, high = (x.item() for x in expected.aminmax())
        self.activation_min = min(self.activation_min, low)
        self.activation_max = max(self.activation_max, high)
        lowest, highest = limits
        steps = expected / integers.q_scale() + integers.q_zero_point()
        outside = (steps < lowest - 0.5) | (steps > highest + 0.5)
        self.clipped += int(outside.sum())
        self.values += expected.numel()

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "sqnr_db": _decibels(self.signal, self.noise),
            "own_sqnr_db": _decibels(self.signal, self.own_noise),
            "weight_min": self.weight_min,
            "weight_max": self.weight_max,
            "activation_min": self.activation_min,
            "activation_max": self.activation_max,
            "clipped": self.clipped / self.values,
        }


@dataclass
class _Layer:
    """One call of a layer. Some round behind the clamp that follows them: it is part of them."""

    damage: _Damage
    modules: list[nn.Module]  # the layer and, where there are any, its clamp and the rounding
    in_int8: str  # the node of the INT8 model that gives the same
    limits: tuple[int, int]  # of its integers


def _integer_layers(net: fx.GraphModule, int8: Any) -> dict[fx.Node, _Layer]:
    in_int8 = {node.name for node in int8.graph.nodes}
    damages: dict[str, _Damage] = {}
    layers: dict[fx.Node, _Layer] = {}
    for node in net.graph.nodes:
        functional = float_functional_of(net, node) if node.op == "call_method" else None
        module: Any = net.get_submodule(node.target) if node.op == "call_module" else functional
        is_integer = getattr(module, "qconfig", None) and not isinstance(module, tq.DeQuantStub)
        if not is_integer or node.name not in in_int8:  # heads for training only are not there
            continue
        behind = _clamp_and_rounding(net, node)
        modules = [module, *(net.get_submodule(str(x.target)) for x in behind)]
        name = str(node.target if functional is None else node.args[0].target)
        kind = node.target if functional else type(int8.get_submodule(name)).__name__
        clamp = f" + {type(modules[1]).__name__}" if behind else ""
        damage = damages.setdefault(name, _Damage(name, _KINDS.get(kind, kind) + clamp))
        if hasattr(module, "weight_fake_quant"):
            module.weight_fake_quant.register_forward_pre_hook(damage.see_weight)
        last = (behind[0] if behind else node).name
        clipped = clip_name(last)
        rounding = modules[-1] if behind else getattr(module, "activation_post_process", None)
        in_int8_as = clipped if clipped in in_int8 else last
        layers[node] = _Layer(damage, modules, in_int8_as, integer_limits(rounding))
    return layers


def _clamp_and_rounding(net: fx.GraphModule, layer: fx.Node) -> list[fx.Node]:
    """The two nodes behind a layer that ``mark_integer_regions`` let round there; else nothing."""
    for clamp in layer.users:
        for user in clamp.users:
            called = net.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(called, tq.FakeQuantizeBase):
                return [clamp, user]
    return []


class _Integers(fx.Interpreter):
    """Runs an INT8 model and keeps what its layers give."""

    def __init__(self, int8: Any, names: set[str]) -> None:
        super().__init__(int8)
        self.names = names
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value.clone()  # what follows may work in place
        return value


class _Comparison(fx.Interpreter):
    """Runs the float network, and each layer once more with its fake-quantisers on."""

    def __init__(
        self, net: fx.GraphModule, layers: dict[fx.Node, _Layer], integers: dict[str, Tensor]
    ) -> None:
        super().__init__(net)
        self.layers, self.integers = layers, integers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.layers:
            layer = self.layers[n]
            _, *behind = layer.modules
            chain = nn.Sequential(*behind)
            for module in layer.modules:
                module.apply(tq.enable_fake_quant)
            alone = chain(super().run_node(n))
            for module in layer.modules:
                module.apply(tq.disable_fake_quant)
            integers = self.integers.pop(layer.in_int8)
            layer.damage.add(chain(value), alone, integers, layer.limits)
        return value


def _power(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item() ** 2


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal and noise else None


def _by_own_sqnr(row: dict[str, Any]) -> float:
    return math.inf if row["own_sqnr_db"] is None else row["own_sqnr_db"]
