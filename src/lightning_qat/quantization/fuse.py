"""Rewrite a traced network so that what integer kernels can compute is modules, and fused ones.

Eager-mode quantisation swaps *modules*: what a network computes with functions (``x + y``,
``F.relu``, ``torch.cat``) has to become modules first, and chains like convolution, batch-norm,
ReLU have to become one.
"""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao import quantization as tq
from torch.ao.nn.quantized import FloatFunctional

from lightning_qat.errors import UserError
from lightning_qat.quantization.kernels import has_state, limitation
from lightning_qat.quantization.transposed import FUSED_TRANSPOSED

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

# The chains that torch, or this package, has a trainable fused module for.
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
    *FUSED_TRANSPOSED,
}

_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}
_VIEWS = {operator.getitem, "view", "transpose", "permute", "flatten", "narrow", "select"}

_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device"}


def fuse(
    graph_module: fx.GraphModule,
    engine: str,
    chains: Sequence[Sequence[str]] | None = None,
) -> list[list[str]]:
    """Turn functions into modules, and chains of modules into fused ones, of the same Parameters.

    Args:
        graph_module: as ``trace`` gives it; is changed in place, and left in train mode.
        engine: the quantised engine of torch to convert for later.
        chains: the names of the modules to fuse; None = all chains that the graph shows.

    Returns:
        The chains that have been fused, each into the module of its first name.

    Raises:
        UserError: ``chains`` names something that is not there or cannot be fused.
    """
    graph_module.train()  # fuse_modules_qat wants it
    _read_what_was_written(graph_module)
    _functions_to_modules(graph_module)
    _one_module_per_use(graph_module)
    _arithmetic_to_float_functional(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    found = [list(chain) for chain in chains or ()]
    if chains is None:
        found = _fusable_chains(graph_module, engine)
    try:
        if found:
            mapping = {"additional_fuser_method_mapping": FUSED_TRANSPOSED}
            tq.fuse_modules_qat(graph_module, found, inplace=True, fuse_custom_config_dict=mapping)
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"fuse={found}: {error}. Give lists of names of submodules that follow each other, as "
            "[['conv1', 'bn1', 'relu']], or leave it out: the chains are found without it."
        ) from error
    _erase_identities(graph_module)
    return found


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


def is_called_once(graph: fx.Graph, name: str) -> bool:
    """Whether the module ``name`` is used in one place only."""
    return sum(node.op == "call_module" and node.target == name for node in graph.nodes) == 1


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


def _functions_to_modules(graph_module: fx.GraphModule) -> None:
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


def _fusable_chains(graph_module: fx.GraphModule, engine: str) -> list[list[str]]:
    """The names of the modules to fuse, chain by chain."""
    chains: list[list[str]] = []
    taken: set[str] = set()
    for node in graph_module.graph.nodes:
        for length in (3, 2):
            names = [str(link.target) for link in _chain(node, length)]
            modules = [graph_module.get_submodule(name) for name in names]
            if (
                tuple(map(type, modules)) in _FUSABLE
                and not any(limitation(module, engine) for module in modules)
                and not _divides_by_zero(modules)
                and all(is_called_once(graph_module.graph, name) for name in names)
                and not taken & set(names)
            ):
                chains.append(names)
                taken |= set(names)
                break
    return chains


def _erase_identities(graph_module: fx.GraphModule) -> None:
    """Fusing leaves one where a layer was; what follows must see the layer itself."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if type(module) is nn.Identity and node.args:
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)


def _divides_by_zero(modules: list[Any]) -> bool:
    """Ours divides by the batch-norm's weight; torch's fused modules have a slow path for that."""
    return isinstance(modules[0], nn.modules.conv._ConvTransposeNd) and not modules[1].weight.all()


def _chain(node: fx.Node, length: int) -> list[fx.Node]:
    """Up to ``length`` module calls from ``node`` on, each the only user of the one before."""
    links = [node] if node.op == "call_module" and len(node.args) + len(node.kwargs) == 1 else []
    while links and len(links) < length and len(links[-1].users) == 1:
        (user,) = links[-1].users
        if user.op != "call_module":
            break
        links.append(user)
    return links
