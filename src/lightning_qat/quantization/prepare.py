"""From a float network to one that fake-quantises itself."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import _FusedModule
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.errors import UserError
from lightning_qat.quantization.functions import functions_to_modules
from lightning_qat.quantization.fuse import fuse
from lightning_qat.quantization.kernels import QAT_LAYERS, number_the_padding
from lightning_qat.quantization.regions import mark_integer_regions
from lightning_qat.quantization.trace import trace

Overrides = Mapping[str | type[nn.Module], tq.QConfig | None]


class FakeQuantisedNetwork(fx.GraphModule):
    """A network that rounds as its INT8 model will. Its state dict says by which scheme."""

    @property
    def in_float(self) -> dict[str, str]:
        """What stays in float, by the name of the module or function: the reason."""
        return self.meta["in_float"]

    @property
    def scheme(self) -> dict[str, str]:
        """What it was prepared with, in words."""
        return self.meta["scheme"]

    def get_extra_state(self) -> Tensor:
        """The scheme, as bytes: weights alone do not say how they are rounded."""
        return torch.tensor(list(json.dumps(self.scheme).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that weights are loaded that were rounded in the same way.

        Raises:
            UserError: they were not, or the scheme is damaged.
        """
        try:
            trained = json.loads(bytes(state.tolist()))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"the scheme in this checkpoint is damaged: {error}") from error
        if trained != self.scheme:
            raise UserError(
                f"this checkpoint was trained with {trained}, and this network is prepared with "
                f"{self.scheme}: give the callback the same."
            )


def prepare_qat(
    net: nn.Module,
    qconfig: tq.QConfig,
    engine: str,
    overrides: Overrides | None = None,
    chains: Sequence[Sequence[str]] | None = None,
    scheme: Mapping[str, str] | None = None,
) -> FakeQuantisedNetwork:
    """Trace, fuse and fake-quantise ``net``; its Parameters are shared with the result.

    Args:
        net: any network that torch.fx can trace. Its own ``fuse_model(is_qat=True)`` is called
            where it has one and ``chains`` is None.
        qconfig: for every layer that ``overrides`` does not name.
        engine: the quantised engine of torch that the network will be converted for.
        overrides: qconfig by name or by type of layers; None as the value = in float. A name also
            covers everything below it, and "" the whole network; the longest name wins, and names
            win over types. What is a function in ``net``, such as a sum, has the name that
            ``functions_to_modules`` gives it.
        chains: names of the modules to fuse; None = all that can be.
        scheme: the arguments in words, which a checkpoint of the result has to match.

    Raises:
        UserError: ``net`` cannot be traced, holds nothing that has an integer kernel, or lacks what
            ``overrides`` or ``chains`` name.
    """
    overrides = overrides or {}
    types = {name: type(module) for name, module in net.named_modules()}
    originals = list(net.named_modules())  # fusing may drop some, whose ids others would take then
    modes = _modes(originals)
    fuse_model: Any = getattr(net, "fuse_model", None)
    if chains is None and callable(fuse_model):
        net.train()
        fuse_model(is_qat=True)
    for module in net.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            number_the_padding(module)
    graph_module = trace(net)
    functions_to_modules(graph_module)
    _check_overrides(overrides, types, graph_module)
    fuse(graph_module, engine, chains)

    used: set[Any] = set()

    def qconfig_of(name: str, module: nn.Module) -> tq.QConfig | None:
        parts = name.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        layer = module[0] if isinstance(module, _FusedModule) else module
        keys: list[Any] = [*around, type(layer), *(types.get(prefix) for prefix in around), ""]
        for key in keys:
            if key in overrides:
                used.add(key)
                return overrides[key]
        return qconfig

    in_float = mark_integer_regions(graph_module, qconfig_of, engine)
    if idle := [key for key in overrides if key not in used]:
        raise UserError(
            f"overrides: {idle[0]!r} changes nothing. What is fused with a layer (batch-norm, "
            "ReLU) goes with it: name the layer. What has no integer kernel is in float anyway."
        )
    if not any(getattr(module, "qconfig", None) for module in graph_module.modules()):
        raise UserError(
            f"{type(net).__name__} holds no layer with an integer kernel (convolution or linear) "
            f"that may be used{_in_words(in_float)}: point `target` at a network that has some."
        )
    for reason in dict.fromkeys(in_float.values()):
        names = [name for name, why in in_float.items() if why == reason]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        rank_zero_info(f"In float, {reason}: {', '.join(names[:8])}{more}.")
    device = next((x.device for x in net.parameters()), torch.device("cpu"))
    graph_module = tq.prepare_qat(graph_module.train(), mapping=QAT_LAYERS, inplace=True)
    prepared = FakeQuantisedNetwork(graph_module, graph_module.graph, type(net).__name__).to(device)
    prepared.meta |= {"in_float": in_float, "scheme": dict(scheme or {})}
    _initialise_weight_scales(prepared)
    _restore_modes(prepared, modes)
    return prepared


def _in_words(in_float: dict[str, str]) -> str:
    return "".join(f"; {name} stays in float ({why})" for name, why in [*in_float.items()][:3])


def is_prepared(net: nn.Module) -> bool:
    """Whether ``net`` holds fake-quantisers already."""
    return any(isinstance(module, tq.FakeQuantizeBase) for module in net.modules())


def _check_overrides(
    overrides: Overrides, types: Mapping[str, type], graph_module: fx.GraphModule
) -> None:
    """Names are those of the network's modules, and of what its functions have become."""
    names = list({**types, **dict(graph_module.named_modules())})
    for key in overrides:
        if (key not in names) if isinstance(key, str) else (key not in types.values()):
            close = difflib.get_close_matches(str(key), names) or names[1:6]
            raise UserError(
                f"overrides: {types[''].__name__} has no layer {key!r}. Names are those of its "
                f"submodules, such as {', '.join(close)}; types are classes, such as "
                "torch.nn.Linear."
            )


@torch.no_grad()
def _initialise_weight_scales(prepared: nn.Module) -> None:
    """Give buffers their final shapes: averaging callbacks and DDP copy them before training."""
    for module in prepared.modules():
        layer: Any = module
        if isinstance(getattr(layer, "weight_fake_quant", None), tq.FakeQuantizeBase):
            layer.weight_fake_quant(layer.weight)


def _modes(originals: list[tuple[str, nn.Module]]) -> dict[str | int, bool]:
    """By name, by object, and by the weight of a batch-norm, which its fused form takes over."""
    modes: dict[str | int, bool] = {}
    for name, module in originals:
        modes[name] = modes[id(module)] = module.training
        if isinstance(module, _BatchNorm) and module.weight is not None:
            modes[id(module.weight)] = module.training
    return modes


def _restore_modes(prepared: nn.Module, modes: dict[str | int, bool]) -> None:
    """What was in evaluation mode, such as a frozen batch-norm, stays in it."""
    for name, module in prepared.named_modules():
        weight = module.weight if isinstance(module, _BatchNorm) else None
        keys = [key for key in (id(module), id(weight), name) if key in modes]
        module.training = modes[keys[0] if keys else ""]
