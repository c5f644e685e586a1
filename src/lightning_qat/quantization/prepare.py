"""From any float network to a fused, fake-quantised one with the same Parameters."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qat.errors import UserError
from lightning_qat.quantization.graph import fuse, mark_integer_regions

log = logging.getLogger(__name__)


def prepare_qat(net: nn.Module, qconfig: tq.QConfig) -> fx.GraphModule:
    """Trace, fuse and fake-quantise ``net``; its Parameters are shared with the result.

    Raises:
        UserError: ``net`` cannot be traced, or holds nothing that has an integer kernel.
    """
    was_training = net.training
    try:
        traced = fx.symbolic_trace(net)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise UserError(
            f"torch.fx cannot trace {type(net).__name__}: {error}. Point `target` at a part of it "
            "whose forward does not depend on the values in its tensors."
        ) from error
    graph_module = fuse(traced)
    in_float = mark_integer_regions(graph_module, qconfig)
    if not any(getattr(module, "qconfig", None) for module in graph_module.modules()):
        raise UserError(
            f"{type(net).__name__} holds no layer with an integer kernel (convolution, linear, "
            "batch-norm): point `target` at a network that has some."
        )
    if in_float:
        log.info("stay in float (no exact integer kernel): %s", ", ".join(in_float))
    return tq.prepare_qat(graph_module.train(), inplace=True).train(was_training)


def is_prepared(net: nn.Module) -> bool:
    """Whether ``net`` holds fake-quantisers already."""
    return any(isinstance(module, tq.FakeQuantizeBase) for module in net.modules())


@torch.no_grad()
def check_same_function(
    float_net: nn.Module, prepared: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Check on eight inputs that fusing has changed nothing: fake-quantisers off, eval mode.

    Args:
        float_net: the network as it was.
        prepared: what ``prepare_qat`` made of it, with the same weights.
        args, kwargs: inputs of ``forward``; tensors have the batch first.

    Raises:
        RuntimeError: an output differs by more than float32 rounding explains.
    """

    def few(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value[:8].cpu() if value.dim() else value.cpu()
            return value.float() if value.is_floating_point() else value
        return value

    def outputs(net: nn.Module) -> list[Tensor]:
        net = copy.deepcopy(net).cpu().float().eval()
        net.apply(tq.disable_observer)
        net.apply(tq.disable_fake_quant)
        return [x for x in tree_leaves(net(*few_args, **few_kwargs)) if isinstance(x, Tensor)]

    few_args, few_kwargs = tree_map(few, (args, kwargs))
    with torch.autocast("cpu", enabled=False):
        for before, after in zip(outputs(float_net), outputs(prepared), strict=True):
            difference = (before - after).abs().max().item()
            # not `>`: a NaN must fail as well
            if not difference <= 1e-3 * max(1.0, before.abs().max().item()):
                raise RuntimeError(
                    f"the fused network does not compute what {type(float_net).__name__} computed: "
                    f"outputs differ by {difference:.2g}. A tensor changed in place after another "
                    "layer has read it, or a module with state called twice, does that."
                )
