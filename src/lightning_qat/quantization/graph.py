"""Rewrite a float network so that every integer kernel it can use comes within reach.

Eager-mode quantisation swaps *modules*: what a network computes with functions (``x + y``,
``F.relu``, ``torch.cat``) has to become modules first, chains like convolution, batch-norm, ReLU
have to become one, and the places where integers begin and end have to be marked. torch.fx traces
the graph that shows all of this.
"""

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import BNReLU2d, BNReLU3d
from torch.ao.nn.quantized import FloatFunctional

# Functions by what they compute; a string is the name of a Tensor method.
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT = {torch.cat, torch.concat}
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), nn.Tanh),
    F.relu6: nn.ReLU6,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
}

# The chains that torch has a trainable fused module for.
_FUSABLE: set[tuple[type[nn.Module], ...]] = {
    (nn.Conv1d, nn.BatchNorm1d, nn.ReLU),
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    (nn.Conv3d, nn.BatchNorm3d, nn.ReLU),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv2d, nn.ReLU),
    (nn.Conv3d, nn.ReLU),
    (nn.Linear, nn.ReLU),
    (nn.BatchNorm2d, nn.ReLU),
    (nn.BatchNorm3d, nn.ReLU),
}

# What prepare_qat gives a fake-quantised weight, and what has an integer kernel without a weight.
_TRAINABLE: Any = tq.get_default_qat_module_mappings()
_INTEGER_MODULES: set[type[nn.Module]] = {
    *_TRAINABLE,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    BNReLU2d,
    BNReLU3d,
    nn.ELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.Tanh,
}

# These take integers to integers of the same scale. Average pools do not belong here: their integer
# kernel rounds the mean to the input's scale, a rounding that no fake-quantiser has trained with.
_SAME_SCALE: set[Any] = {
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.Identity, nn.Flatten,
    nn.Dropout, nn.Dropout2d, F.max_pool2d, torch.max_pool2d,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, operator.getitem,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "contiguous",
}  # fmt: skip

_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def fuse(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Turn functions into modules, and chains of modules into fused ones, of the same Parameters.

    Args:
        graph_module: as torch.fx traced it; is changed in place, and left in train mode.
    """
    graph_module.train()  # fuse_modules_qat wants it
    _functions_to_modules(graph_module)
    _one_module_per_use(graph_module)
    _arithmetic_to_float_functional(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    chains = _fusable_chains(graph_module)
    return tq.fuse_modules_qat(graph_module, chains, inplace=True) if chains else graph_module


def mark_integer_regions(graph_module: fx.GraphModule, qconfig: tq.QConfig) -> list[str]:
    """Give ``qconfig`` to what has an integer kernel; put QuantStubs and DeQuantStubs around it.

    Returns the names of the modules and functions that stay in float.
    """
    graph = graph_module.graph
    shapes = _shape_nodes(graph)
    is_integer: dict[fx.Node, bool] = {}
    stubs: dict[tuple[fx.Node, bool], fx.Node] = {}
    in_float: list[str] = []

    def stub_after(source: fx.Node, to_integer: bool) -> fx.Node:
        """One stub for all that read ``source`` on the other side."""
        if (source, to_integer) not in stubs:
            stub: Any = tq.QuantStub() if to_integer else tq.DeQuantStub()
            stub.qconfig = qconfig
            name = f"{'quant' if to_integer else 'dequant'}_{source.name}"
            graph_module.add_submodule(name, stub)
            with graph.inserting_after(source):
                stubs[source, to_integer] = graph.call_module(name, (source,))
        return stubs[source, to_integer]

    for node in list(graph.nodes):
        functional = _float_functional_of(graph_module, node)
        if node in shapes or (node.op == "get_attr" and functional is not None):
            continue
        kind: Any = node.target
        if node.op == "call_module":
            module: Any = graph_module.get_submodule(str(node.target))
            kind = type(module)
        sources = [source for source in node.all_input_nodes if source in is_integer]
        if node.op == "call_module" and kind in _INTEGER_MODULES:
            module.qconfig = qconfig
            is_integer[node] = True
        elif functional is not None:
            functional.qconfig = qconfig
            is_integer[node] = True
        elif node.op.startswith("call") and kind in _SAME_SCALE:
            is_integer[node] = bool(sources) and all(is_integer[source] for source in sources)
        else:
            is_integer[node] = False
            if node.op.startswith("call"):
                in_float.append(str(node.target) if node.op == "call_module" else node.name)
        for source in sources:
            if is_integer[source] != is_integer[node]:
                node.replace_input_with(source, stub_after(source, is_integer[node]))
    graph.lint()
    graph_module.recompile()
    return in_float


def _shape_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that hold sizes, not tensors."""
    shapes: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        asks = (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
            node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        )
        if asks or (inputs and all(source in shapes for source in inputs)):
            shapes.add(node)
    return shapes


def _float_functional_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """The FloatFunctional that ``node`` fetches or calls, if any."""
    if node.op == "call_method" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.op != "get_attr":
        return None
    owner: Any = graph_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    return owner if isinstance(owner, FloatFunctional) else None


def _new_submodule(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module) -> str:
    """Add ``module`` beside the layers that ``node`` was traced from, and return its name."""
    scopes = list(node.meta.get("nn_module_stack", {}))
    name = f"{scopes[-1]}.{node.name}" if scopes and scopes[-1] else node.name
    existing = dict(graph_module.named_modules())
    while name in existing or hasattr(graph_module, name):
        name += "_"
    graph_module.add_submodule(name, module)
    return name


def _functions_to_modules(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target is F.dropout:  # its `training` was decided when the network was traced
            module: nn.Module = nn.Dropout(node.kwargs.get("p", (*node.args, 0.5)[1]))
        elif node.target in _ACTIVATIONS:
            module = _ACTIVATIONS[node.target]()
        else:
            continue
        name = _new_submodule(graph_module, node, module)
        with graph.inserting_before(node):
            call = graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _one_module_per_use(graph_module: fx.GraphModule) -> None:
    """Give a module without state that is called several times one copy per call."""
    called: set[Any] = set()
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(node.target)
        if node.target in called and not any(
            True for _ in (*module.parameters(), *module.buffers())
        ):
            node.target = _new_submodule(graph_module, node, copy.deepcopy(module))
        called.add(node.target)


def _arithmetic_to_float_functional(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    shapes = _shape_nodes(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node in shapes:
            continue
        of_two_tensors = (
            len(node.args) == 2
            and not node.kwargs
            and all(isinstance(arg, fx.Node) and arg not in shapes for arg in node.args)
        )
        last = node
        kwargs = {"dim" if name == "axis" else name: x for name, x in node.kwargs.items()}
        if node.target in _CAT:
            method = "cat"
        elif node.target in _MUL and of_two_tensors:
            method = "mul"
        elif node.target in _ADD and of_two_tensors:
            method = "add"
            users = list(node.users)
            if len(users) == 1 and _is_relu(graph_module, users[0]):
                method, last = "add_relu", users[0]
        else:
            continue
        name = _new_submodule(graph_module, node, FloatFunctional())
        with graph.inserting_before(node):
            call = graph.call_method(method, (graph.get_attr(name), *node.args), kwargs)
        last.replace_all_uses_with(call)
        if last is not node:
            graph.erase_node(last)
        graph.erase_node(node)


def _is_relu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return (
        node.op == "call_module" and type(graph_module.get_submodule(str(node.target))) is nn.ReLU
    )


def _fusable_chains(graph_module: fx.GraphModule) -> list[list[str]]:
    """The names of the modules to fuse, chain by chain."""
    calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    chains: list[list[str]] = []
    taken: set[str] = set()
    for node in graph_module.graph.nodes:
        for length in (3, 2):
            names = [str(link.target) for link in _chain(node, length)]
            types = tuple(type(graph_module.get_submodule(name)) for name in names)
            called_once = all(calls.count(name) == 1 for name in names)
            if types in _FUSABLE and called_once and not taken & set(names):
                chains.append(names)
                taken |= set(names)
                break
    return chains


def _chain(node: fx.Node, length: int) -> list[fx.Node]:
    """Up to ``length`` module calls from ``node`` on, each the only user of the one before."""
    links = [node] if node.op == "call_module" else []
    while links and len(links) < length and len(links[-1].users) == 1:
        (user,) = links[-1].users
        if user.op != "call_module":
            break
        links.append(user)
    return links
