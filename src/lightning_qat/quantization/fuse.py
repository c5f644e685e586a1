"""Make chains of layers, like convolution, batch-norm, ReLU, one layer each."""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.ao import quantization as tq

from lightning_qat.errors import UserError
from lightning_qat.quantization.kernels import limitation
from lightning_qat.quantization.transposed import FUSED_TRANSPOSED

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


def fuse(
    graph_module: fx.GraphModule,
    engine: str,
    chains: Sequence[Sequence[str]] | None = None,
) -> None:
    """Turn chains of modules into fused ones, of the same Parameters.

    Args:
        graph_module: as ``functions_to_modules`` leaves it; is changed in place, and left in train
            mode.
        engine: the quantised engine of torch to convert for later.
        chains: the names of the modules to fuse; None = all chains that the graph shows.

    Raises:
        UserError: ``chains`` names something that is not there or cannot be fused.
    """
    graph_module.train()  # fuse_modules_qat wants it
    if chains is None:
        found = _fusable_chains(graph_module, engine)
    else:
        found = [list(chain) for chain in chains]
    try:
        if found:
            mapping = {"additional_fuser_method_mapping": FUSED_TRANSPOSED}
            tq.fuse_modules_qat(graph_module, found, inplace=True, fuse_custom_config_dict=mapping)
    except (AttributeError, NotImplementedError, AssertionError) as error:
        if chains is None:
            raise  # a fault of ours
        raise UserError(
            f"fuse={found}: {error}. Give lists of names of submodules that follow each other, as "
            "[['conv1', 'bn1', 'relu']], or leave it out: the chains are found without it."
        ) from error
    _erase_identities(graph_module)


def is_called_once(graph: fx.Graph, name: str) -> bool:
    """Whether the module ``name`` is used in one place only."""
    return sum(node.op == "call_module" and node.target == name for node in graph.nodes) == 1


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
