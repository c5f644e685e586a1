"""Which parts of a fused network become integers, and where integers begin and end."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.ao import quantization as tq
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.quantization.functions import float_functional_of, shape_nodes
from lightning_qat.quantization.fuse import is_called_once
from lightning_qat.quantization.kernels import (
    CLAMPS,
    INTEGER_FUNCTIONS,
    LAYER_FUNCTIONS,
    QAT_LAYERS,
    keeps_scale,
    limitation,
)
from lightning_qat.quantization.qconfig import of_an_end
from lightning_qat.quantization.trace import BY_MODE

# The qconfig of a layer by its name; None keeps it in float.
QConfigOf = Callable[[str, nn.Module], tq.QConfig | None]


def mark_integer_regions(
    graph_module: fx.GraphModule, qconfig_of: QConfigOf, engine: str
) -> dict[str, str]:
    """Give a qconfig to what has an integer kernel; put QuantStubs and DeQuantStubs around it.

    Layers always become integers. Other kernels do where an integer comes in: rounding a float only
    for them would cost accuracy and win nothing.

    Returns:
        What stays in float and might have been expected not to: name -> reason.
    """
    return _Marking(graph_module, qconfig_of, engine).in_float


class _Marking:
    def __init__(self, graph_module: fx.GraphModule, qconfig_of: QConfigOf, engine: str) -> None:
        self.graph_module, self.graph = graph_module, graph_module.graph
        self.qconfig_of, self.engine = qconfig_of, engine
        self.in_float: dict[str, str] = {}
        self.qconfigs: dict[fx.Node, tq.QConfig | None] = {}  # of a tensor; None = it is a float
        self.rounds: set[fx.Node] = set()  # layers and sums: they round to a scale of their own
        self.stubs: dict[tuple[fx.Node, tq.QConfig | None], fx.Node] = {}
        self.layers = [
            node
            for node in self.graph.nodes
            if node.op == "call_module"
            and type(graph_module.get_submodule(str(node.target))) in QAT_LAYERS
        ]
        shapes = shape_nodes(self.graph)
        for node in list(self.graph.nodes):
            functional = float_functional_of(graph_module, node)
            if node in shapes or (node.op == "get_attr" and functional is not None):
                continue
            module = functional
            if node.op == "call_module":
                module = graph_module.get_submodule(str(node.target))
            sources = [source for source in node.all_input_nodes if source in self.qconfigs]
            wanted = self._qconfig(node, module, sources)
            self.qconfigs[node] = wanted
            for source in sources:
                if bool(self.qconfigs[source]) != bool(wanted):
                    node.replace_input_with(source, self._stub_after(source, wanted))
            if wanted and type(module) in CLAMPS and self._is_alone_behind(sources[0]):
                self._round_after(node, wanted)
        self._give_bits_by_readers()
        self.graph.lint()
        graph_module.recompile()

    def _qconfig(self, node: fx.Node, module: Any, sources: list[fx.Node]) -> tq.QConfig | None:
        """The qconfig of what ``node`` computes, which its module then has; None = in float."""
        if node.target == BY_MODE:
            return None
        incoming = [self.qconfigs[source] for source in sources]
        functional = node.op == "call_method" and module is not None
        called: Any = node.args[0] if functional else node
        name = str(called.target if module is not None else node.name)
        is_layer = type(module) in QAT_LAYERS
        if is_layer or functional or type(module) in INTEGER_FUNCTIONS:
            if not is_layer and not any(incoming):
                return None
            reason = None if functional else limitation(module, self.engine)
            if is_layer and len(node.args) + len(node.kwargs) > 1:
                reason = "called with more than its input"
            if isinstance(module, _BatchNorm) and not is_called_once(self.graph, name):
                reason = "called more than once"
            qconfig = None if reason else self.qconfig_of(name, module)
            if qconfig is None:
                self.in_float[name] = reason or "kept in float by `overrides`"
                return None
            if is_layer and node in (self.layers[0], self.layers[-1]):
                qconfig = of_an_end(qconfig, is_last=node is self.layers[-1])
            module.qconfig = qconfig
            if is_layer or functional:
                self.rounds.add(node)
            return qconfig
        if incoming and all(incoming):
            if type(module) in CLAMPS and self._is_alone_behind(sources[0]):
                return incoming[0]
            if keeps_scale(node, module) and not self._may_upsample_signals(node, module):
                return incoming[0]
        makes_a_tuple = isinstance(node.target, type)  # GoogLeNetOutputs, say
        if node.target in LAYER_FUNCTIONS:
            self.in_float[name] = "a layer as a function"
        elif (any(incoming) and node.op.startswith("call") and not makes_a_tuple) or (
            node.op == "call_module"
            and not keeps_scale(node, module)
            and type(module) not in CLAMPS
        ):
            self.in_float[name] = "no exact integer kernel"
        return None

    def _give_bits_by_readers(self) -> None:
        """A tensor has the bits of the layer that reads it, because bits are what products cost.

        What no layer reads, such as both sides of a residual sum, has 8.
        """
        rounding: dict[nn.Module, list[fx.Node]] = {}
        concerned = {*self.rounds, *self.stubs.values(), *self.qconfigs}
        for node in self.graph.nodes:  # in its order: where readers differ, the first decides
            if node not in concerned:
                continue
            module = float_functional_of(self.graph_module, node)
            if node.op == "call_module":
                module = self.graph_module.get_submodule(str(node.target))
            if isinstance(module, nn.Module) and node.op != "get_attr":
                rounding.setdefault(module, []).append(node)
        for module, nodes in rounding.items():
            own: Any = getattr(module, "qconfig", None) or self.qconfigs.get(nodes[0])
            wide = getattr(own, "wide", None)
            readers = [reader for node in nodes for reader in self._multipliers(node, own)]
            if isinstance(module, tq.QuantStub | tq.DeQuantStub) and wide is None:
                continue  # it was made for its reader
            wanted = readers[0] if readers else wide  # what reads a tensor says how many bits
            if wanted is None or own in readers:
                continue
            if isinstance(module, tq.FakeQuantizeBase):
                self.graph_module.set_submodule(str(nodes[0].target), wanted.activation())
            elif getattr(module, "qconfig", None) and own.activation is not nn.Identity:
                mixed: Any = tq.QConfig(activation=wanted.activation, weight=own.weight)
                module.qconfig = mixed

    def _multipliers(self, node: fx.Node, own: Any) -> list[Any]:
        """The qconfigs of few bits of the layers, or ``own`` for products, that read ``node``."""
        found: list[Any] = []
        for user in node.users:
            functional = float_functional_of(self.graph_module, user)
            if user in self.layers:
                found += [self.qconfigs[user]]
            elif functional is not None:
                found += [own] if user.target == "mul" else []
            elif self.qconfigs.get(user) and not self._rounds_anew(user):
                found += self._multipliers(user, own)
        return [qconfig for qconfig in found if getattr(qconfig, "wide", None) is not None]

    def _rounds_anew(self, node: fx.Node) -> bool:
        """Whether the integers that ``node`` takes in are not those that it gives."""
        is_module = node.op == "call_module"
        module = self.graph_module.get_submodule(str(node.target)) if is_module else None
        return type(module) in INTEGER_FUNCTIONS

    def _may_upsample_signals(self, node: fx.Node, module: Any) -> bool:
        """There is no integer kernel for tensors of three dimensions."""
        upsamples = isinstance(module, nn.Upsample) or node.target is F.interpolate
        return upsamples and any(isinstance(x, nn.Conv1d) for x in self.graph_module.modules())

    def _is_alone_behind(self, source: fx.Node) -> bool:
        """Whether a clamp may go before the rounding of ``source``: nothing else reads that."""
        if source not in self.rounds or len(source.users) > 1:
            return False
        return source.op != "call_module" or is_called_once(self.graph, str(source.target))

    def _round_after(self, clamp: fx.Node, qconfig: tq.QConfig) -> None:
        """Let a layer round behind its clamp: 6 need not be a multiple of the layer's scale.

        Clamping commutes with rounding, so the INT8 model may do it in the other order: its layer
        gets this fake-quantiser's scale, see ``convert``.
        """
        (source,) = clamp.all_input_nodes
        producer = float_functional_of(self.graph_module, source)
        if producer is None:
            producer = self.graph_module.get_submodule(str(source.target))
        producer.qconfig = tq.QConfig(activation=nn.Identity, weight=qconfig.weight)
        fake_quant = self._insert_after(clamp, f"round_{clamp.name}", qconfig.activation())
        clamp.replace_all_uses_with(fake_quant, lambda user: user is not fake_quant)
        self.qconfigs[fake_quant] = qconfig

    def _stub_after(self, source: fx.Node, qconfig: tq.QConfig | None) -> fx.Node:
        """One stub for all that read ``source`` on the other side, with the same qconfig."""
        key = (source, qconfig)
        if key not in self.stubs:
            stub: Any = tq.QuantStub() if qconfig else tq.DeQuantStub()
            # without a qconfig it would not be converted
            stub.qconfig = getattr(qconfig, "of_input", None) or qconfig or self.qconfigs[source]
            name = f"{'quant' if qconfig else 'dequant'}_{source.name}"
            if qconfig and source.op != "call_module":  # it may be a mask
                with self.graph.inserting_after(source):
                    numbers = self.graph.call_method("float", (source,))
                self.stubs[key] = self._insert_after(numbers, name, stub)
            else:
                self.stubs[key] = self._insert_after(source, name, stub)
        return self.stubs[key]

    def _insert_after(self, source: fx.Node, name: str, module: nn.Module) -> fx.Node:
        while hasattr(self.graph_module, name):
            name += "_"
        self.graph_module.add_submodule(name, module)
        with self.graph.inserting_after(source):
            return self.graph.call_module(name, (source,))
