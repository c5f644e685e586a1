"""The graph of a network as torch.fx sees it, made to serve training and evaluation alike."""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.kernels import has_state

BY_MODE = "output_by_mode"
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
_PLAIN = (type(None), bool, int, float, str)


def trace(net: nn.Module) -> fx.GraphModule:
    """Trace ``net``: the result shares its Parameters and computes what it computes in both modes.

    Arguments of ``forward`` that have a default keep it; those whose default is None count as
    given where more layers depend on them than do without, else as left out.

    Raises:
        UserError: torch.fx cannot follow ``forward``, which depends on values in its tensors; or
            evaluation uses other layers than training.
    """
    if fx.Tracer().is_leaf_module(net, ""):
        net = nn.Sequential(net)  # a graph of one layer
    arguments = inspect.signature(net.forward).parameters.values()
    defaults = {x.name: x.default for x in arguments if isinstance(x.default, _PLAIN)}
    given = {name: value for name, value in defaults.items() if value is not None}
    graphs: list[fx.Graph] = []
    errors: list[Exception] = []
    for concrete in (defaults, given) if len(given) < len(defaults) else (defaults,):
        try:
            graphs.append(_trace_both_modes(net, concrete))
        except UserError:
            raise
        except Exception as error:  # whatever forward raises when it meets a stand-in for a tensor
            errors.append(error)
    if not graphs:
        raise UserError(
            f"torch.fx cannot trace {type(net).__name__}{_line_of(errors[-1])}: {errors[-1]}. "
            "Point `target` at a part of the network whose forward does not depend on the values "
            "or the number of its tensors."
        ) from errors[-1]
    graph = max(graphs, key=_count_layers)  # of equals the first: with arguments left out
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for placeholder, name in zip(
        placeholders, inspect.signature(net.forward).parameters, strict=False
    ):
        if str(placeholder.target) == f"{name}_{str(placeholder.target).rpartition('_')[2]}":
            placeholder.target = name  # torch.fx numbers the arguments that have kept a default
    if any(node.target == BY_MODE for node in graph.nodes):
        net.add_module(BY_MODE, OutputByMode())
    return fx.GraphModule(net, graph, type(net).__name__)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or _is_opaque(m)


def _is_opaque(module: nn.Module) -> bool:
    """A module without state or layers that torch.fx cannot follow, or that depends on the mode.

    DropPath and StochasticDepth, say: as modules they keep looking at ``training``.
    """
    if has_state(module):
        return False
    try:
        with _mode(module, True):
            in_training = str(fx.Tracer().trace(module))
        with _mode(module, False):
            return in_training != str(fx.Tracer().trace(module))
    except Exception:  # whatever its forward raises
        return True


@contextmanager
def _mode(net: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in net.modules()}
    net.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def _trace_both_modes(net: nn.Module, concrete_args: dict[str, Any]) -> fx.Graph:
    """One graph; where the modes give different outputs, its last node chooses between them."""
    with _mode(net, False):
        evaluation = _Tracer().trace(net, concrete_args)
    with _mode(net, True):
        training = _Tracer().trace(net, concrete_args)
    same: dict[fx.Node, fx.Node] = {}  # evaluation -> training
    unmatched = [node for node in training.nodes if node.op != "output"]
    (output,) = (node for node in training.nodes if node.op == "output")
    for node in evaluation.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), same.__getitem__)
        if node.op == "output":
            if str(args[0]) != str(output.args[0]):
                with training.inserting_before(output):
                    chosen = training.call_module(BY_MODE, (output.args[0], args[0]))
                output.args, output.type = (chosen,), None  # an annotation holds for one mode
            break
        twin = next((x for x in unmatched if _is_twin(net, x, node, args, kwargs)), None)
        if twin is not None:
            unmatched.remove(twin)
        elif node.op == "call_module" and list(net.get_submodule(node.target).parameters()):
            raise UserError(
                f"{type(net).__name__} calls {node.target} in evaluation in another way than in "
                "training, so there is no INT8 model of what was trained: point `target` at a part "
                "that runs the same layers in both."
            )
        else:
            with training.inserting_before(output):
                twin = training.node_copy(node, same.__getitem__)
        same[node] = twin
    return training


def _is_twin(net: Any, twin: fx.Node, node: fx.Node, args: Any, kwargs: Any) -> bool:
    if twin.op == node.op == "get_attr" and "_tensor_constant" in str(node.target):
        a, b = (getattr(x.graph.owning_module or net, str(x.target)) for x in (twin, node))
        return torch.equal(a, b)
    if (twin.op, twin.target) != (node.op, node.target):
        return False
    if str((twin.args, twin.kwargs)) == str((args, kwargs)):
        return True
    if node.target in _DROPOUTS and twin.args[:1] == args[:1]:
        twin.meta["dropout_in_training"] = True  # the graph has only training's value of the flag
        return True
    return False


class OutputByMode(nn.Module):
    """Chooses between what ``forward`` returns in training and what it returns in evaluation."""

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """One of the two, which may be any structure of tensors."""
        return in_training if self.training else in_evaluation


def _count_layers(graph: fx.Graph) -> int:
    return sum(node.op == "call_module" for node in graph.nodes)


def _line_of(error: Exception) -> str:
    """Where the network, not torch.fx, raised ``error``."""
    torch_folder = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if torch_folder not in Path(frame.filename).parents and frame.filename != __file__:
            return f" at {frame.filename}:{frame.lineno}, `{frame.line}`"
    return ""
