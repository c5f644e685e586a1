"""Make modules of what a network computes with functions, and new tensors of changed ones.

Eager-mode quantisation swaps *modules*: ``x + y``, ``F.relu`` and ``torch.cat`` have to become some
before anything can be fused or fake-quantised.
"""

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.nn.quantized import FloatFunctional

from lightning_qat.errors import UserError
from lightning_qat.quantization.kernels import has_state

# Functions by what they compute; a string is the name of a Tensor method.
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}
_CAT = {torch.cat, torch.concat, torch.concatenate}
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), nn.Tanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), nn.LeakyReLU),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), nn.Hardtanh),
    **dict.fromkeys((F.elu, F.elu_), nn.ELU),
    F.relu6: nn.ReLU6,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
}
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
}

_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}
_VIEWS = {operator.getitem, "view", "transpose", "permute", "flatten", "narrow", "select"}

_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device"}


def functions_to_modules(graph_module: fx.GraphModule) -> None:
    """Rewrite ``graph_module``, as ``trace`` gives it, in place; it computes what it did.

    Raises:
        UserError: a part of a tensor is changed in place.
    """
    _read_what_was_written(graph_module)
    _activations_to_modules(graph_module)
    _one_module_per_use(graph_module)
    _arithmetic_to_float_functional(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()


def shape_nodes(graph: fx.Graph) -> set[fx.Node]:
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


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, buffers, and what is computed of them alone."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and all(source in constants for source in inputs)):
            constants.add(node)
    return constants


def float_functional_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
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


def _read_what_was_written(graph_module: fx.GraphModule) -> None:
    """Who reads a tensor after it was changed in place gets the result of the change.

    Integers are dequantised into a copy: a change of that would not reach other readers.

    Raises:
        UserError: a part of a tensor is changed in place.
    """
    before: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        before.add(node)
        if not _is_in_place(graph_module, node) or not isinstance(node.args[0], fx.Node):
            continue
        changed = node.args[0]
        if not node.users and changed.target in _VIEWS:
            raise UserError(
                f"{node.name} changes a part of a tensor in place ({changed.name}), which the "
                "INT8 model would not see: compute a new tensor instead."
            )
        changed.replace_all_uses_with(node, lambda user: user not in before)


def _is_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if not node.args or not node.op.startswith("call"):
        return False
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_method = name.endswith("_") and not name.endswith("__")
    return is_method or bool(node.kwargs.get("inplace")) or node.target in _IN_PLACE


def _activations_to_modules(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target == "view" and not any(isinstance(x, torch.dtype) for x in node.args):
            node.target = "reshape"  # integer convolutions give channels-last tensors
        kwargs = dict(node.kwargs)
        source, *settings = node.args or (kwargs.pop("input", None),)
        if node.meta.get("dropout_in_training"):
            # after the probability, which the module has as well, comes the flag
            module: nn.Module = _DROPOUTS[node.target](*settings[:1], **_only(kwargs, "p"))
        elif node.target in _ACTIVATIONS:
            module = _ACTIVATIONS[node.target](*settings, **kwargs)
        else:
            continue
        name = _new_submodule(graph_module, node, module)
        with graph.inserting_before(node):
            call = graph.call_module(name, (source,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _only(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: kwargs[name]} if name in kwargs else {}


def _one_module_per_use(graph_module: fx.GraphModule) -> None:
    """Give a module without state that is called several times one copy per call."""
    called: set[Any] = set()
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph_module.get_submodule(node.target)
        if node.target in called and not has_state(module):
            node.target = _new_submodule(graph_module, node, copy.deepcopy(module))
        called.add(node.target)


def _arithmetic_to_float_functional(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    shapes, constants = shape_nodes(graph), _constant_nodes(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node in shapes:
            continue
        # a parameter or a constant has no scale that eight bits per tensor would do justice
        of_two_tensors = (
            len(node.args) == 2
            and not node.kwargs
            and all(isinstance(x, fx.Node) and x not in shapes for x in node.args)
            and not constants & set(node.all_input_nodes)
        )
        last = node
        kwargs = {"dim" if name == "axis" else name: x for name, x in node.kwargs.items()}
        if node.target in _CAT and node.args:
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
