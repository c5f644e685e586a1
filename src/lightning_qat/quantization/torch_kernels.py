"""From a lowered graph to torch's integer kernels.

The new graph is written in one pass. A value is held quantized where ``quantize`` made it and
operators only moved it since; it is dequantized where an operator wants floats.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen

from lightning_qat.quantization.torch_ao import (
    Int8Model,
    Layer,
    has_float_output,
    has_relu,
    integer_module,
    limitation,
)

aten: Any = torch.ops.aten
quantized: Any = torch.ops.quantized
LAYERS = {
    "linear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
CLAMPS = {"relu", "relu6", "hardtanh", "clamp"}
# These take integers to integers of the same scale, and torch has them for quantized tensors.
# Averages do not belong here: their kernels round to the scale of the input.
SAME_SCALE = {
    "relu", "max_pool1d", "max_pool2d", "max_pool3d", "flatten", "unflatten", "view", "reshape",
    "permute", "transpose", "movedim", "contiguous", "clone", "alias", "squeeze", "unsqueeze",
    "expand", "repeat", "slice", "select", "narrow", "flip", "index_select", "chunk", "split",
    "split_with_sizes", "unbind", "upsample_nearest2d", "upsample_nearest3d", "pixel_shuffle",
    "channel_shuffle", "constant_pad_nd", "pad",
}  # fmt: skip
GIVE_LISTS = {"chunk", "split", "split_with_sizes", "unbind"}
CHECKS = ("_assert", "sym_constrain", "_guards_fn")


class FloatLayer(nn.Module):
    """A layer that computes in float32 and holds its weight as integers.

    Args:
        layer: a linear layer or a convolution.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.axis = int(layer.is_transposed)
        shape = [-1 if i == self.axis else 1 for i in range(layer.integers.ndim)]
        self.register_buffer("integers", layer.integers)
        self.register_buffer("scale", layer.scale.reshape(shape))
        self.register_buffer("bias", layer.bias)
        self.is_linear, self.transposed = layer.kind == "linear", layer.is_transposed
        self.stride, self.padding = list(layer.stride), list(layer.padding)
        self.dilation, self.output_padding = list(layer.dilation), list(layer.output_padding)
        self.groups = layer.groups

    def weight(self) -> Tensor:
        """Return the weight as a quantized tensor, with a scale for each output channel."""
        scale = self.scale.flatten().double()
        zeros = torch.zeros(len(scale), dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(self.integers, scale, zeros, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return float32, in the shapes of the float layer."""
        # `to(x)`: a constant would be frozen as floats, four times as large
        weight = self.integers.to(x) * self.scale
        if self.is_linear:
            return F.linear(x, weight, self.bias)
        return torch.convolution(
            x, weight, self.bias, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups,
        )  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """A value of the new graph that is a tensor of torch.quint8, or a list of some."""

    node: Any
    scale: float
    zero_point: int
    limits: tuple[int, int]

    @property
    def steps(self) -> tuple[float, int]:
        """Scale and zero point."""
        return self.scale, self.zero_point


def to_torch_kernels(lowered: fx.GraphModule, engine: str) -> Int8Model:
    """Return ``lowered`` with torch's integer kernels in place of layers between integers.

    Each layer is a module of ``torch.ao.nn.quantized`` under the name that it has in the network,
    or a FloatLayer where ``engine`` has no right kernel for it; ``weight()`` of both gives the
    quantized weight. A layer that is called with other scales again has a number behind its name.

    Args:
        lowered: as ``lower`` makes it. It is not changed.
        engine: one of ``torch.backends.quantized.supported_engines``.
    """
    return _Translation(lowered, engine).model()


def _name(node: Any) -> str:
    """Return the operator of ``node`` without namespace, overload, and mark of in-place ones."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    return target.overloadpacket.__name__.rstrip("_")


def _is_ours(node: Any, name: str) -> bool:
    packet = getattr(node.target, "overloadpacket", None) if isinstance(node, fx.Node) else None
    return packet is getattr(torch.ops.lightning_qat, name)


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((x.name for x in schema), node.args, strict=False)) | node.kwargs
    return {x.name: given.get(x.name, x.default_value) for x in schema}


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_view(node: Any) -> bool:
    """Return True where ``node`` may share the memory of its first argument."""
    if not isinstance(node, fx.Node) or node.target is operator.getitem:
        return isinstance(node, fx.Node)
    if not isinstance(node.target, torch._ops.OpOverload) or _writes(node):
        return False
    return any(x.alias_info is not None for x in node.target._schema.returns)


class _Translation:
    def __init__(self, lowered: fx.GraphModule, engine: str) -> None:
        self.lowered, self.engine = lowered, engine
        self.graph, self.root = fx.Graph(), nn.Module()
        self.floats: dict[fx.Node, Any] = {}
        self.quantized: dict[fx.Node, Quantized] = {}
        self.modules: dict[Any, str] = {}
        self.in_float: dict[str, str] = {}
        self.chains: dict[fx.Node, list[fx.Node]] = {}
        self.written: set[fx.Node] = set()

    def model(self) -> Int8Model:
        nodes = list(self.lowered.graph.nodes)
        for node in nodes:
            if _is_ours(node, "quantize"):
                self._find_chain(node)
            elif _writes(node) and self._has_views(node.args[0]):
                self._keep_memory(node.args[0])
        later = {node for chain in self.chains.values() for node in chain}
        for node in nodes:
            if node not in later and node.op != "output":
                self._translate(node)
        (output,) = nodes[-1].args
        self._write_output(output)
        self.graph.eliminate_dead_code(
            lambda node: node.op in ("placeholder", "output") or str(node.target).endswith("_")
        )
        model = Int8Model(self.root, self.graph, "Int8Model")
        model.meta |= {"engine": self.engine, "in_float": self.in_float}
        return model.eval()

    def _find_chain(self, quantize: fx.Node) -> None:
        """Note the layer or sum before ``quantize``, with the clamps between them."""
        chain: list[fx.Node] = []
        node: Any = quantize.args[0]
        while isinstance(node, fx.Node) and len(node.users) == 1:
            chain.insert(0, node)
            if _name(node) in LAYERS or _name(node) == "add":
                inputs = [x for x in node.all_input_nodes if len(x.users) > 1]
                if not (_writes(node) and inputs):
                    self.chains[quantize] = chain
                return
            if _name(node) not in CLAMPS or len(node.all_input_nodes) != 1:
                return
            node = node.args[0]

    def _has_views(self, node: Any) -> bool:
        return _is_view(node) or any(_is_view(user) for user in node.users)

    def _keep_memory(self, node: fx.Node) -> None:
        """Let ``node``, and what shares its memory, be floats that operators write to."""
        while _is_view(node):
            node = node.args[0]  # type: ignore[assignment]
        pending = [node]
        while pending:
            node = pending.pop()
            self.written.add(node)
            pending += [user for user in node.users if _is_view(user)]

    def _translate(self, node: fx.Node) -> None:
        name = _name(node)
        if node.op == "placeholder":
            self.floats[node] = self.graph.placeholder(str(node.target))
        elif node.op == "get_attr" or name.startswith(CHECKS) or name == "dequantize_per_channel":
            return  # constants are written where they are used
        elif _is_ours(node, "quantize"):
            self.quantized[node] = self._quantize(node)
        elif _is_ours(node, "dequantize"):
            self.quantized[node] = self._dequantize(node)
            if node in self.written:
                self._float(node)
        elif name == "sym_size":
            source, axis = node.args
            held: Any = self.quantized.get(source)  # type: ignore[arg-type]
            x = held.node if held else self._float(source)
            self.floats[node] = self.graph.call_method("size", (x, axis))
        elif name in LAYERS and self._layer(node) is not None:
            self.floats[node] = self._float_output(node)
        elif (held := self._moved(node, name)) is not None:
            self.quantized[node] = held
        else:
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        """Write the operator of ``node`` for floats."""
        target: Any = node.target
        kwargs = {
            k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")
        }
        changes = _writes(node) and node.args[0] not in self.written
        if isinstance(target, torch._ops.OpOverload):
            target = target.overloadpacket  # TorchScript knows no overloads
            if changes:
                target = getattr(aten, target.__name__.removesuffix("_"))
        args, kwargs = fx.node.map_arg((node.args, kwargs), self._float)
        result = self.graph.create_node(node.op, target, args, kwargs)
        self.floats[node] = result
        if changes:  # read what was written from here on
            self.quantized.pop(node.args[0], None)  # type: ignore[arg-type]
            self.floats[node.args[0]] = result  # type: ignore[index]

    def _float(self, node: Any) -> Any:
        if node not in self.floats:
            if node in self.quantized:
                self.floats[node] = self.graph.call_method(
                    "dequantize", (self.quantized[node].node,)
                )
            elif node.op == "get_attr":
                self.floats[node] = self._constant(str(node.target), self._value(node))
            else:
                self.floats[node] = self._constant(node.name, self._value(node))
        return self.floats[node]

    def _value(self, node: Any) -> Any:
        """Return the tensor that a constant of the lowered graph is."""
        if node.op == "get_attr":
            value: Any = self.lowered
            for part in node.target.split("."):
                value = getattr(value, part)
            return value.detach() if isinstance(value, Tensor) else value
        values = [self._value(x) if isinstance(x, fx.Node) else x for x in node.args]
        return node.target(*values)

    def _constant(self, name: str, value: Any) -> fx.Node:
        parent, name = self._place(name)
        if isinstance(value, Tensor):
            parent[1].register_buffer(name, value)
        else:
            setattr(parent[1], name, value)
        return self.graph.get_attr(parent[0] + name)

    def _place(self, name: str) -> tuple[tuple[str, nn.Module], str]:
        """Return prefix and module of the parent of ``name``, and a free last part."""
        *parents, last = name.split(".")
        if hasattr(Int8Model, (*parents, last)[0]):  # such as `graph`
            (*parents, last) = f"_{name}".split(".")
        module = self.root
        for part in parents:
            if not isinstance(getattr(module, part, None), nn.Module):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        free, number = last, 0
        while hasattr(module, free):
            number += 1
            free = f"{last}_{number}"
        return ("".join(f"{part}." for part in parents), module), free

    def _dequantize(self, node: fx.Node) -> Quantized:
        source, scale, zero_point = node.args
        if source in self.quantized:
            return self.quantized[source]  # type: ignore[index]
        integers = self._value(source)
        if integers.dtype == torch.int8:
            integers, zero_point = (integers.int() + 128).to(torch.uint8), zero_point + 128  # type: ignore[operator]
        value = torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)  # type: ignore[arg-type]
        constant = self._constant(f"{node.name}_constant", value)
        return Quantized(constant, scale, zero_point, (0, 255))  # type: ignore[arg-type]

    def _moved(self, node: fx.Node, name: str) -> Quantized | None:
        """Return the value of an operator that keeps the scale of its quantized input."""
        if node in self.written or not node.args:
            return None
        if name in ("cat", "stack"):
            return self._joined(node)
        held = self.quantized.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if held is None:
            return None
        if node.target is operator.getitem:
            return replace(
                held, node=self.graph.call_function(operator.getitem, (held.node, node.args[1]))
            )
        only_items = all(user.target is operator.getitem for user in node.users)
        if name not in SAME_SCALE or (name in GIVE_LISTS and not only_items):
            return None
        if self.engine == "qnnpack" and name == "max_pool3d":
            return None
        lowest, highest = held.limits
        if name == "relu":
            lowest = max(lowest, held.zero_point)
        if name in ("constant_pad_nd", "pad"):
            given = _arguments(node)
            if given.get("value") or given.get("mode", "constant") != "constant":
                return None
            lowest, highest = min(lowest, held.zero_point), max(highest, held.zero_point)
        target = node.target.overloadpacket  # type: ignore[union-attr]
        if _writes(node):
            target = getattr(aten, name)
        rest, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), self._float)
        moved = self.graph.call_function(target, (held.node, *rest), kwargs)
        return replace(held, node=moved, limits=(lowest, highest))

    def _joined(self, node: fx.Node) -> Quantized | None:
        held = [self.quantized.get(x) for x in node.args[0]]  # type: ignore[union-attr]
        first = held[0]
        if first is None or any(x is None or x.steps != first.steps for x in held):
            return None
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        joined = self.graph.call_function(
            packet, ([x.node for x in held], *node.args[1:]), node.kwargs
        )  # type: ignore[union-attr]
        limits = min(x.limits[0] for x in held), max(x.limits[1] for x in held)  # type: ignore[union-attr]
        return replace(first, node=joined, limits=limits)

    def _quantize(self, node: fx.Node) -> Quantized:
        x, scale, zero_point, lowest, highest, signed = node.args
        shift = 128 if signed else 0  # torch's kernels take unsigned activations only
        wanted: Any = Quantized(
            None,
            scale,
            zero_point + shift,
            (lowest + shift, highest + shift),  # type: ignore
        )
        chain = self.chains.get(node)
        if chain:
            made = self._fused(chain, wanted)
            if made is not None:
                return made
            for part in chain:
                self._translate(part)
        held = self.quantized.get(x)  # type: ignore[arg-type]
        if held is not None and held.steps == wanted.steps:
            return self._clamped(held, wanted.limits)
        rounded = self.graph.call_function(
            torch.quantize_per_tensor, (self._float(x), *wanted.steps, torch.quint8)
        )
        return self._clamped(replace(wanted, node=rounded, limits=(0, 255)), wanted.limits)

    def _clamped(self, held: Quantized, limits: tuple[int, int]) -> Quantized:
        low, high = max(held.limits[0], limits[0]), min(held.limits[1], limits[1])
        if (low, high) == held.limits:
            return held
        x = held.node
        if self.engine == "qnnpack":  # its clamp mixes up channels_last
            x = self.graph.call_function(aten.contiguous, (x,))
        values = [(limit - held.zero_point) * held.scale for limit in (low, high)]
        return replace(
            held, node=self.graph.call_function(aten.clamp, (x, *values)), limits=(low, high)
        )

    def _fused(self, chain: list[fx.Node], wanted: Quantized) -> Quantized | None:
        """Return the value of one kernel for ``chain``; None where there is none."""
        first = chain[0]
        has_relu_kernel = has_relu(_name(first)) if _name(first) in LAYERS else True
        limits, relu = wanted.limits, False
        for clamp in chain[1:]:
            clamps = _clamp_limits(clamp, wanted)
            if clamps is None:
                return None
            limits = max(limits[0], clamps[0]), min(limits[1], clamps[1])
            limits = min(limits), max(limits[1], 0)
            relu = relu or (has_relu_kernel and _name(clamp) == "relu")
        made = (
            self._sum(first, relu, wanted)
            if _name(first) == "add"
            else self._integer_layer(first, relu, wanted)
        )
        if made is None:
            return None
        natural = (wanted.zero_point if relu else 0, 255)
        return self._clamped(replace(wanted, node=made, limits=natural), limits)

    def _sum(self, node: fx.Node, relu: bool, wanted: Quantized) -> fx.Node | None:
        given = _arguments(node)
        terms = [given["self"], given["other"]]
        if given["alpha"] != 1 or not all(isinstance(x, fx.Node) for x in terms):
            return None
        held = [self.quantized.get(x) for x in terms]
        if None in held or len({str(tuple(x.meta["val"].shape)) for x in terms}) > 1:
            return None
        kernel = quantized.add_relu if relu else quantized.add
        return self.graph.call_function(kernel, (*(x.node for x in held), *wanted.steps))  # type: ignore[union-attr]

    def _layer(self, node: fx.Node) -> tuple[Layer, list[int]] | None:
        """Return the layer that ``node`` calls, and the zeros to put around its input."""
        given = _arguments(node)
        weight, bias, kind = given["weight"], given["bias"], _name(node)
        if not _is_ours(weight, "dequantize_per_channel"):
            return None
        if isinstance(bias, fx.Node):
            if not _is_ours(bias, "dequantize_per_channel"):
                return None
            steps, scale = (self._value(x) for x in bias.args[:2])
            bias = (steps.double() * scale.double()).float()
        integers, scale, _, name = weight.args
        integers = self._value(integers)
        layer = Layer(name or kind, kind, integers, self._value(scale), bias)
        dims = integers.ndim - 2
        if kind == "linear":
            return layer, []
        if node.meta["val"].ndim != integers.ndim:  # one image, without a batch
            return None
        numbers = {
            key: _spread(given[key], dims)
            for key in ("stride", "padding", "dilation", "output_padding")
            if key in given and not isinstance(given[key], str)
        }
        layer = replace(layer, groups=given["groups"], **numbers)
        if given["padding"] != "same":
            return replace(layer, padding=layer.padding or (0,) * dims), []
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        layer = replace(layer, padding=tuple(span // 2 for span in spans))
        odd = [x for span in reversed(spans) for x in (0, span % 2)]
        return layer, odd if any(odd) else []

    def _module(self, layer: Layer, key: tuple[Any, ...], make: Callable[[], nn.Module]) -> str:
        """Return the name of the module for ``layer``, which calls of equal ``key`` share."""
        tensors = [x for x in (layer.integers, layer.scale, layer.bias) if x is not None]
        full = (layer.name, *key, *(x.numpy().tobytes() for x in tensors))
        if full not in self.modules:
            (prefix, parent), last = self._place(layer.name)
            parent.add_module(last, make())
            self.modules[full] = prefix + last
        return self.modules[full]

    def _padded(self, x: Any, zeros: list[int]) -> Any:
        return self.graph.call_function(aten.constant_pad_nd, (x, zeros)) if zeros else x

    def _integer_layer(self, node: fx.Node, relu: bool, wanted: Quantized) -> fx.Node | None:
        x, found = self.quantized.get(node.args[0]), self._layer(node)  # type: ignore[arg-type]
        if x is None or found is None:
            return None
        layer, zeros = found
        reason = limitation(layer, self.engine)
        if reason is not None:
            self.in_float[layer.name] = reason
            return None
        name = self._module(
            layer, (wanted.steps, relu),
            lambda: integer_module(layer, relu, wanted.steps, self.engine),
        )  # fmt: skip
        return self.graph.call_module(name, (self._padded(x.node, zeros),))

    def _float_output(self, node: fx.Node) -> fx.Node:
        """Write a layer whose output is not quantized, or that has no integer kernel."""
        layer, zeros = self._layer(node)  # type: ignore[misc]
        x = self.quantized.get(node.args[0])  # type: ignore[arg-type]
        if (
            x is not None
            and has_float_output(layer.kind, self.engine)
            and node.meta["val"].ndim > 1
        ):
            name = self._module(
                layer, ("sums",), lambda: integer_module(layer, False, None, self.engine)
            )
            return self.graph.call_module(name, (x.node,))
        why = "no integers come in" if x is None else "what it gives is not quantized"
        self.in_float.setdefault(layer.name, why)
        name = self._module(layer, ("float",), lambda: FloatLayer(layer))
        return self.graph.call_module(name, (self._padded(self._float(node.args[0]), zeros),))

    def _write_output(self, outputs: Sequence[Any]) -> None:
        """Give the new graph the arguments and results of the float network."""
        results = [self._float(x) if isinstance(x, fx.Node) else x for x in outputs]
        codegen: Any = self.lowered.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen):
            self.graph.output(outputs if isinstance(outputs, fx.Node) else results)
            return
        info = codegen.pytree_info
        inputs = [x for spec in info.in_spec.children() for x in spec.children()]
        if all(x.is_leaf() for x in inputs) and _is_plain(info.out_spec):
            self.graph.output(pytree.tree_unflatten(results, info.out_spec))
        else:
            self.graph.output(results)
            self.graph.set_codegen(_PyTreeCodeGen(info))


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def _is_plain(spec: Any) -> bool:
    """Return True where ``spec`` is made of what Python code can write: tuples, lists, dicts."""
    return spec.is_leaf() or (
        spec.type in (tuple, list, dict) and all(_is_plain(x) for x in spec.children())
    )


def _clamp_limits(node: fx.Node, wanted: Quantized) -> tuple[int, int] | None:
    """Return the integers at which ``node`` clamps; rounding may come first."""
    given, name = _arguments(node), _name(node)
    low, high = {
        "relu": (0, None),
        "relu6": (0, 6),
        "hardtanh": (given.get("min_val"), given.get("max_val")),
        "clamp": (given.get("min"), given.get("max")),
    }[name]
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    steps = [
        None if x is None else round(x / wanted.scale) + wanted.zero_point for x in (low, high)
    ]
    lowest = 0 if steps[0] is None else min(max(steps[0], 0), 255)
    highest = 255 if steps[1] is None else min(max(steps[1], 0), 255)
    return lowest, highest
