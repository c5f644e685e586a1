"""Export a network with torch.export, and compute all values that depend on no input once."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from lightning_qat.quantization import ops

_ATEN = torch.ops.aten
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_QAT = getattr(torch.ops, ops.NAMESPACE)
# integer kernels read the integers
_KEPT = (_QAT.dequantize.default, _QAT.dequantize_per_channel.default)


def export_program(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Literal["batch", "size"] = "batch",
) -> ExportedProgram:
    """Export ``network`` for any batch size, with its constants computed.

    The batch size is dimension 0 of the first tensor in ``args`` and ``kwargs``. If dimension 0 of
    another tensor has the same size, it is the batch, too. If the network does not permit another
    batch size or image size, the size is fixed and a warning says so.

    Args:
        network: a network in evaluation mode.
        args: the positional arguments of an example, with tensors at any depth.
        kwargs: the keyword arguments of the example.
        dynamic: ``"size"`` also permits any height and width: the last two dimensions of each
            tensor with four or more dimensions.
    """
    args, kwargs = pytree.tree_map_only(Tensor, _two_samples(args, kwargs), (args, kwargs))
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
    free = [(x, 0) for x in inputs if x.shape[0] == inputs[0].shape[0]]
    if dynamic == "size":
        free += [(x, x.ndim - end) for x in inputs if x.ndim >= 4 for end in (2, 1)]
    try:
        program = _export(network, args, kwargs, free)
    except Exception as error:  # torch raises errors of many types for unsupported code
        warnings.warn(
            "The exported network takes only the shapes of the example inputs. torch.export "
            f"cannot express other shapes: {str(error).strip().splitlines()[0]}",
            stacklevel=2,
        )
        program = _export(network, args, kwargs, [])
    else:
        fixed = _fixed(program, inputs, free)
        if fixed:
            sizes = {"image size" if dimension else "batch size" for _, dimension in fixed}
            warnings.warn(
                f"The exported network takes only the {' and '.join(sorted(sizes))} of the example "
                "inputs: its forward depends on that number.",
                stacklevel=2,
            )
            still = [x for x in free if not any(x[0] is y and x[1] == d for y, d in fixed)]
            program = _export(network, args, kwargs, still)  # torch may keep a symbol for a number
    fold_constants(program)
    _let_go_of_symbols(program)
    return program


def _let_go_of_symbols(program: ExportedProgram) -> None:
    """Break the cycles that Python's collector does not see. Otherwise torch keeps every export."""
    mode: Any = detect_fake_mode([node.meta.get("val") for node in program.graph.nodes])
    if mode is None or mode.shape_env is None:
        return
    mode.shape_env.tracked_fakes = None
    mode.shape_env.fake_tensor_cache.clear()
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def _export(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: list[tuple[Tensor, int]],
) -> ExportedProgram:
    """Export with the given dimensions of the inputs free."""
    shapes = torch.export.ShapesCollection()
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.ndim:
            shapes[x] = {dimension: Dim.AUTO for y, dimension in free if y is x}
    with torch.no_grad():
        return torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)


def _two_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return a function that repeats a batch of one: torch.export treats a size of one as fixed."""
    first = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    if first is None or not first.ndim or first.shape[0] != 1:
        # clone, because torch.export does not allow the same tensor twice
        return lambda x: x.detach().clone()
    return lambda x: torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x.detach().clone()


def _fixed(
    program: ExportedProgram, inputs: list[Tensor], free: list[tuple[Tensor, int]]
) -> list[tuple[Tensor, int]]:
    """Return the dimensions that should be free but are fixed."""
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.name in names]
    values = [v for node in nodes if isinstance(v := node.meta.get("val"), Tensor) and v.ndim]
    return [
        (x, dimension)
        for x, dimension in free
        for y, value in zip(inputs, values, strict=True)
        if x is y and str(value.shape[dimension]).isdigit()
    ]


def fold_constants(program: ExportedProgram) -> None:
    """Compute all values that depend on no input, and store each result as a buffer of ``program``.

    Keep the dequantize operators of weights.
    """
    graph, signature = program.graph_module.graph, program.graph_signature
    for node in list(graph.nodes):
        if node.target is _ATEN._assert_tensor_metadata.default:
            graph.erase_node(node)
    stored = {**program.state_dict, **program.constants}
    values = _constants(program, stored)
    first = next(iter(graph.nodes))
    added: list[InputSpec] = []
    for node in [n for n in values if n.op == "call_function"]:
        if isinstance(values[node], Tensor) and any(user not in values for user in node.users):
            name = f"constant_{len(added)}"
            with graph.inserting_before(first):
                placeholder = graph.placeholder(name)
            placeholder.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(placeholder, lambda user: user not in values)
            program.state_dict[name] = values[node].clone(memory_format=torch.contiguous_format)
            argument = TensorArgument(placeholder.name)
            added.append(InputSpec(InputKind.BUFFER, argument, name, persistent=True))
    for node in reversed(list(graph.nodes)):
        if node in values and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    left = {node.name for node in graph.nodes if node.op == "placeholder"}
    signature.input_specs[:] = added + [s for s in signature.input_specs if s.arg.name in left]
    for name in stored.keys() - {spec.target for spec in signature.input_specs}:
        program.state_dict.pop(name, None)
        program.constants.pop(name, None)
    program.graph_module.recompile()


def _constants(program: ExportedProgram, stored: dict[str, Any]) -> dict[fx.Node, Any]:
    """Compute each node that depends on no input.

    A tensor is not constant if an in-place operation writes input data to it. Its views are not
    constant either. Start again without such a tensor each time one is found.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    written: set[fx.Node] = set()
    while True:
        values: dict[fx.Node, Any] = {}
        found: set[fx.Node] = set()
        for node in program.graph.nodes:
            spec = specs.get(node.name) if node.op == "placeholder" else None
            if node in written:
                continue
            if spec is not None and spec.kind in _WEIGHTS and spec.target is not None:
                # clone, because of in-place operations
                values[node] = stored[spec.target].detach().clone()
            elif _is_constant(node, values):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
            else:
                found.update(_written_by(node, values))
        if not found:
            return values
        memory = {_memory(values[node]) for node in found}
        written.update(
            n for n, x in values.items() if isinstance(x, Tensor) and _memory(x) in memory
        )


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _written_by(node: fx.Node, values: dict[fx.Node, Any]) -> list[fx.Node]:
    """Return the constants among the arguments that ``node`` changes in place."""
    schema = getattr(node.target, "_schema", None)
    arguments = zip(schema.arguments, node.args, strict=False) if schema is not None else ()
    return [
        x
        for argument, x in arguments
        if argument.is_write and isinstance(x, fx.Node) and isinstance(values.get(x), Tensor)
    ]


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op != "call_function" or node.target in _KEPT or not callable(node.target):
        return False
    sources = node.all_input_nodes
    makes_tensor = isinstance(node.meta.get("val"), Tensor | list | tuple)
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return makes_tensor and not is_random and all(source in values for source in sources)
