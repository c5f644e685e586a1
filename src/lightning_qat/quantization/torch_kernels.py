"""Translate a lowered graph to torch's integer kernels.

The new graph is written in one pass. A value stays quantized after ``quantize`` as long as
operators only move it. It is dequantized for operators that take floats.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen

from lightning_qat.quantization.torch_ao import has_float_output, has_relu, integer_module
from lightning_qat.quantization.torch_layers import (
    LAYERS,
    FloatLayer,
    Layer,
    arguments,
    is_ours,
    limitation,
    operator_name,
    read_layer,
)
from lightning_qat.quantization.torch_model import Int8Model

aten: Any = torch.ops.aten
kernels: Any = torch.ops.quantized
CLAMPS = {"relu", "relu6", "hardtanh", "clamp"}
# These operators keep the scale, and torch has them for quantized tensors. Averages do not belong
# here, because their kernels round to the scale of the input.
SAME_SCALE = {
    "relu", "max_pool1d", "max_pool2d", "max_pool3d", "flatten", "unflatten", "view", "reshape",
    "permute", "transpose", "movedim", "contiguous", "clone", "alias", "squeeze", "unsqueeze",
    "expand", "repeat", "slice", "select", "narrow", "flip", "index_select", "chunk", "split",
    "split_with_sizes", "unbind", "upsample_nearest2d", "upsample_nearest3d", "pixel_shuffle",
    "channel_shuffle", "constant_pad_nd", "pad",
}  # fmt: skip
GIVE_LISTS = {"chunk", "split", "split_with_sizes", "unbind"}
CHECKS = ("_assert", "sym_constrain", "_guards_fn")


@dataclass(frozen=True)
class Quantized:
    """A value of the new graph: a tensor of torch.quint8, or a list of such tensors.

    Attributes:
        node: node of the new graph.
        scale, zero_point: scale and zero point of the tensor.
        limits: the lowest and the highest integer that it may contain.
    """

    node: Any
    scale: float
    zero_point: int
    limits: tuple[int, int] = (0, 255)

    @property
    def steps(self) -> tuple[float, int]:
        """Scale and zero point."""
        return self.scale, self.zero_point


def to_torch_kernels(lowered: fx.GraphModule, engine: str) -> Int8Model:
    """Return ``lowered`` with torch's integer kernels instead of layers between integers.

    Each layer is a module of ``torch.ao.nn.quantized`` under its name in the network. It is a
    FloatLayer if ``engine`` has no correct kernel for it. ``weight()`` of both returns the
    quantized weight. If a layer is called again with other scales, its second module has a number
    after its name.

    Args:
        lowered: a graph made by ``lower``. It is not changed.
        engine: one of ``torch.backends.quantized.supported_engines``.
    """
    return _Translation(lowered, engine).model()


class _Translation:
    def __init__(self, lowered: fx.GraphModule, engine: str) -> None:
        self.lowered, self.engine = lowered, engine
        self.graph, self.root = fx.Graph(), nn.Module()
        self.floats: dict[Any, Any] = {}
        self.quantized: dict[Any, Quantized] = {}
        self.modules: dict[Any, str] = {}
        self.in_float: dict[str, str] = {}
        self.chains: dict[Any, list[Any]] = {}
        self.written: set[Any] = set()

    def model(self) -> Int8Model:
        *nodes, output = self.lowered.graph.nodes
        for node in nodes:
            if is_ours(node, "quantize"):
                self.find_chain(node)
            elif _writes(node) and any(map(_is_view, (node.args[0], *node.args[0].users))):
                self.keep_memory(node.args[0])
        later = {node for chain in self.chains.values() for node in chain}
        for node in nodes:
            if node not in later:
                self.translate(node)
        self.write_output(output.args[0])
        self.graph.eliminate_dead_code(
            lambda node: node.op in ("placeholder", "output") or str(node.target).endswith("_")
        )
        model = Int8Model(self.root, self.graph, "Int8Model")
        model.meta |= {"engine": self.engine, "in_float": self.in_float}
        return model.eval()

    def find_chain(self, quantize: Any) -> None:
        """Note the layer or sum before ``quantize``, and the clamps between them."""
        chain: list[Any] = []
        node = quantize.args[0]
        while isinstance(node, fx.Node) and len(node.users) == 1:
            chain.insert(0, node)
            if operator_name(node) in LAYERS or operator_name(node) in ("add", "hardswish"):
                if not _writes(node) or len(node.args[0].users) == 1:  # type: ignore[union-attr]
                    self.chains[quantize] = chain
                return
            if operator_name(node) not in CLAMPS:
                return
            node = node.args[0]

    def keep_memory(self, node: Any) -> None:
        """Keep ``node`` and values that share its memory as floats that operators can change."""
        while _is_view(node):
            node = node.args[0]
        pending = [node]
        while pending:
            node = pending.pop()
            self.written.add(node)
            pending += [user for user in node.users if _is_view(user)]

    def translate(self, node: Any) -> None:
        name = operator_name(node)
        if node.op == "placeholder":
            self.floats[node] = self.graph.placeholder(node.target)
        elif node.op == "get_attr" or name.startswith(CHECKS) or name == "dequantize_per_channel":
            return  # constants are written at their place of use
        elif is_ours(node, "quantize"):
            self.quantized[node] = self.quantize(node)
        elif is_ours(node, "dequantize"):
            self.quantized[node] = self.dequantize(node)
            if node in self.written:
                self.float(node)
        elif name == "dropout":
            self.same(node, node.args[0])
        elif name == "sym_size":
            held = self.quantized.get(node.args[0])
            x = held.node if held else self.float(node.args[0])
            self.floats[node] = self.graph.call_method("size", (x, node.args[1]))
        elif name in LAYERS and read_layer(node, self.value) is not None:
            self.floats[node] = self.float_output(node)
        elif (held := self.moved(node, name)) is not None:
            self.quantized[node] = held
        else:
            self.call(node)

    def same(self, node: Any, source: Any) -> None:
        for values in (self.floats, self.quantized):
            if source in values:
                values[node] = values[source]

    def call(self, node: Any) -> None:
        """Write the operator of ``node`` for floats."""
        target, changes = _packet(node), _writes(node) and node.args[0] not in self.written
        if changes:
            target = getattr(aten, operator_name(node))
        kwargs = {
            k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")
        }
        args, kwargs = fx.node.map_arg((node.args, kwargs), self.float)
        self.floats[node] = self.graph.create_node(node.op, target, args, kwargs)
        if changes:  # later readers see the change
            self.quantized.pop(node.args[0], None)
            self.floats[node.args[0]] = self.floats[node]

    def float(self, node: Any) -> Any:
        """Return the node of the new graph that holds ``node`` in float32."""
        if node not in self.floats and node in self.quantized:
            held = self.quantized[node].node
            self.floats[node] = self.graph.call_method("dequantize", (held,))
        elif node not in self.floats:
            name = node.target if node.op == "get_attr" else node.name
            self.floats[node] = self.constant(name, self.value(node))
        return self.floats[node]

    def value(self, node: Any) -> Any:
        """Return a constant of the lowered graph."""
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(self.lowered)
            return value.detach() if isinstance(value, Tensor) else value
        return node.target(*fx.node.map_arg(node.args, self.value))

    def constant(self, name: str, value: Any) -> fx.Node:
        prefix, parent, last = self.place(name)
        if isinstance(value, Tensor):
            parent.register_buffer(last, value)
        else:
            setattr(parent, last, value)
        return self.graph.get_attr(prefix + last)

    def place(self, name: str) -> tuple[str, nn.Module, str]:
        """Return prefix and parent module of ``name``, and a free last part of the name."""
        *parents, last = name.split(".")
        if hasattr(Int8Model, name.split(".")[0]):  # a name such as `graph`
            *parents, last = f"layer_{name}".split(".")
        module = self.root
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        names = [last, *(f"{last}_{i}" for i in range(1, len(self.modules) + 2))]
        free = next(x for x in names if not hasattr(module, x))
        return "".join(f"{part}." for part in parents), module, free

    def dequantize(self, node: Any) -> Quantized:
        source, scale, zero_point = node.args
        if source in self.quantized:
            return self.quantized[source]
        integers = self.value(source)
        shift = 128 if integers.dtype == torch.int8 else 0
        steps = scale, zero_point + shift
        unsigned = (integers.int() + shift).to(torch.uint8)
        value = torch._make_per_tensor_quantized_tensor(unsigned, *steps)
        return Quantized(self.constant(f"{node.name}_integers", value), *steps)

    def moved(self, node: Any, name: str) -> Quantized | None:
        """Return the value of an operator that keeps the scale of its quantized input."""
        only_items = all(user.target is operator.getitem for user in node.users)
        if node in self.written or not node.args or (name in GIVE_LISTS and not only_items):
            return None
        first, *rest = node.args
        inputs = [self.quantized.get(x) for x in (first if name in ("cat", "stack") else [first])]
        held = inputs[0]
        if held is None or any(x is None or x.steps != held.steps for x in inputs):
            return None
        lowest = min(x.limits[0] for x in inputs if x)
        highest = max(x.limits[1] for x in inputs if x)
        if name == "getitem":
            pass
        elif name in ("cat", "stack"):
            first = [x.node for x in inputs if x]
        elif name not in SAME_SCALE or (name, self.engine) == ("max_pool3d", "qnnpack"):
            return None
        elif name == "relu":
            lowest = max(lowest, held.zero_point)
        elif name in ("constant_pad_nd", "pad"):
            given = arguments(node)
            if given.get("value") or given.get("mode", "constant") != "constant":
                return None
            lowest, highest = min(lowest, held.zero_point), max(highest, held.zero_point)
        target = getattr(aten, name) if _writes(node) else _packet(node)
        rest, kwargs = fx.node.map_arg((rest, node.kwargs), self.float)
        first = first if isinstance(first, list) else held.node
        made = self.graph.call_function(target, (first, *rest), kwargs)
        return replace(held, node=made, limits=(lowest, highest))

    def quantize(self, node: Any) -> Quantized:
        x, scale, zero_point, lowest, highest, signed = node.args
        shift = 128 if signed else 0  # torch's kernels take only unsigned activations
        wanted = Quantized(None, scale, zero_point + shift, (lowest + shift, highest + shift))
        chain = self.chains.get(node, [])
        made = self.fused(chain, wanted) if chain else None
        if made is not None:
            return made
        for part in chain:
            self.translate(part)
        held = self.quantized.get(x)
        if held is not None and held.steps == wanted.steps:
            return self.clamped(held, wanted.limits)
        # torch.quantize_per_tensor multiplies by 1 / scale, which rounds some values differently.
        integers = self.graph.call_function(aten.div, (self.float(x), wanted.scale))
        for function, args in (
            (aten.round_, ()),
            (aten.add_, (wanted.zero_point,)),
            (aten.clamp_, wanted.limits),
            (aten.to, (torch.uint8,)),
            (torch._make_per_tensor_quantized_tensor, wanted.steps),
        ):
            integers = self.graph.call_function(function, (integers, *args))
        return replace(wanted, node=integers)

    def clamped(self, held: Quantized, limits: tuple[int, int]) -> Quantized:
        low, high = max(held.limits[0], limits[0]), min(held.limits[1], limits[1])
        if (low, high) == held.limits:
            return held
        x = held.node
        if self.engine == "qnnpack":  # its clamp returns channels_last in the wrong order
            x = self.graph.call_function(aten.contiguous, (x,))
        values = [(limit - held.zero_point) * held.scale for limit in (low, high)]
        node = self.graph.call_function(aten.clamp, (x, *values))
        return replace(held, node=node, limits=(low, high))

    def fused(self, chain: list[Any], wanted: Quantized) -> Quantized | None:
        """Return the value of one kernel for ``chain``, or None if there is no kernel."""
        first, name = chain[0], operator_name(chain[0])
        limits, relu = wanted.limits, False
        for clamp in chain[1:]:
            found = _clamp_limits(clamp, wanted)
            if found is None:
                return None
            limits = max(limits[0], found[0]), max(limits[0], min(limits[1], found[1]))
            relu |= operator_name(clamp) == "relu"
        relu &= name == "add" or (name in LAYERS and has_relu(name))
        if name in LAYERS:
            made = self.integer_layer(first, relu, wanted)
        else:
            made = self.function(first, name, relu, wanted)
        if made is None:
            return None
        natural = (wanted.zero_point if relu else 0, 255)
        return self.clamped(replace(wanted, node=made, limits=natural), limits)

    def function(self, node: Any, name: str, relu: bool, wanted: Quantized) -> fx.Node | None:
        """Write a sum, or another function that has an integer kernel."""
        inputs = [x for x in node.args if isinstance(x, fx.Node)]
        held = [self.quantized[x].node for x in inputs if x in self.quantized]
        shapes = {str(tuple(x.meta["val"].shape)) for x in inputs}
        if name == "add":
            kernel, arity = kernels.add_relu if relu else kernels.add, 2
        else:
            kernel, arity = kernels.hardswish, 1
        plain = len(node.args) == arity and arguments(node).get("alpha", 1) == 1
        if len(held) != arity or not plain or len(shapes) > 1:
            return None
        return self.graph.call_function(kernel, (*held, *wanted.steps))

    def module(self, layer: Layer, key: Any, make: Callable[[], nn.Module]) -> str:
        """Return the name of the module for ``layer``. Calls with an equal ``key`` share it."""
        tensors = [x for x in (layer.integers, layer.scale, layer.bias) if x is not None]
        full = (layer.name, key, *(x.numpy().tobytes() for x in tensors))
        if full not in self.modules:
            prefix, parent, last = self.place(layer.name)
            parent.add_module(last, make())
            self.modules[full] = prefix + last
        return self.modules[full]

    def padded(self, x: Any, zeros: list[int]) -> Any:
        return self.graph.call_function(aten.constant_pad_nd, (x, zeros)) if zeros else x

    def integer_layer(self, node: Any, relu: bool, wanted: Quantized) -> fx.Node | None:
        x, found = self.quantized.get(node.args[0]), read_layer(node, self.value)
        if x is None or found is None:
            return None
        layer, zeros = found
        reason = limitation(layer, self.engine)
        if reason is not None:
            self.in_float[layer.name] = reason
            return None
        name = self.module(
            layer,
            (wanted.steps, relu),
            lambda: integer_module(layer, relu, wanted.steps, self.engine),
        )
        return self.graph.call_module(name, (self.padded(x.node, zeros),))

    def float_output(self, node: Any) -> fx.Node:
        """Write a layer whose output is not quantized, or that has no integer kernel."""
        layer, zeros = read_layer(node, self.value)  # type: ignore[misc]
        x = self.quantized.get(node.args[0])
        sums = has_float_output(layer.kind, self.engine) and node.meta["val"].ndim > 1
        if x is not None and sums:
            name = self.module(layer, None, lambda: integer_module(layer, False, None, self.engine))
            return self.graph.call_module(name, (x.node,))
        reason = "its input is not quantized" if x is None else "its output is not quantized"
        self.in_float.setdefault(layer.name, reason)
        name = self.module(layer, "float", lambda: FloatLayer(layer))
        return self.graph.call_module(name, (self.padded(self.float(node.args[0]), zeros),))

    def write_output(self, outputs: Sequence[Any]) -> None:
        """Give the new graph the arguments and results of the float network."""
        results = fx.node.map_arg(outputs, self.float)
        codegen: Any = self.lowered.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen):
            self.graph.output(results)
            return
        info: Any = codegen.pytree_info
        inputs = [x for spec in info.in_spec.children() for x in spec.children()]
        if all(x.is_leaf() for x in inputs) and _is_plain(info.out_spec):
            self.graph.output(pytree.tree_unflatten(results, info.out_spec))
        else:
            self.graph.output(results)
            self.graph.set_codegen(_PyTreeCodeGen(info))


def _packet(node: Any) -> Any:
    """Return the target of ``node`` without an overload, because TorchScript knows no overloads."""
    return getattr(node.target, "overloadpacket", node.target)


def _writes(node: Any) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_view(node: Any) -> bool:
    """Return True if ``node`` may share the memory of its first argument."""
    if not isinstance(getattr(node, "target", None), torch._ops.OpOverload) or _writes(node):
        return getattr(node, "target", None) is operator.getitem
    return any(x.alias_info is not None for x in node.target._schema.returns)


def _is_plain(spec: Any) -> bool:
    """Return True if ``spec`` has only types that code can write: tuples, lists and dicts."""
    plain = spec.is_leaf() or spec.type in (tuple, list, dict)
    return plain and all(_is_plain(x) for x in spec.children())


def _clamp_limits(node: Any, wanted: Quantized) -> tuple[int, int] | None:
    """Return the integers at which ``node`` clamps. Clamping may follow the rounding."""
    given = arguments(node)
    ends = {
        "relu": (0, None),
        "relu6": (0, 6),
        "hardtanh": (given.get("min_val"), given.get("max_val")),
        "clamp": (given.get("min"), given.get("max")),
    }[operator_name(node)]
    if any(isinstance(x, fx.Node) for x in ends):
        return None
    steps = (
        default if x is None else min(max(round(x / wanted.scale) + wanted.zero_point, 0), 255)
        for x, default in zip(ends, (0, 255), strict=True)
    )
    low, high = steps
    return low, high
