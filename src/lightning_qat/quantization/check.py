"""Whether a prepared network still computes what the float one did, and has seen its data."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic.qat import LinearBn1d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qat.errors import UserError


def unobserved(net: nn.Module) -> list[str]:
    """The names of the fake-quantisers of ``net`` whose observers have seen nothing yet."""
    return [name for name, seen in _observers(net) if not seen]


def has_run(net: nn.Module) -> bool:
    """Whether any observer of activations has seen something, if there is one that could.

    Those of weights see something without a step.
    """
    seen = [seen for name, seen in _observers(net) if "weight_fake_quant" not in name]
    return any(seen) or not seen


def refuse_unobserved(net: nn.Module, target: str) -> None:
    """Check that there is a scale for every tensor.

    Raises:
        UserError: an observer has seen nothing.
    """
    if blind := unobserved(net):
        raise UserError(
            f"training has run without the observers of {blind[0]!r} ({len(blind)} in all), so its "
            "scale is unknown. Either freeze_observer_epoch has come before they saw anything: "
            f"raise it; or training_step does not use {target!r} itself but holds its layers by "
            "another name: use that one; or it does not use it in the first epoch: let it."
        )


def _observers(net: nn.Module) -> Iterator[tuple[str, bool]]:
    for name, module in net.named_modules():
        observer: Any = getattr(module, "activation_post_process", None)
        if isinstance(module, tq.FakeQuantizeBase) and hasattr(observer, "min_val"):
            lowest = observer.min_val
            yield name, bool(lowest.numel()) and not torch.isinf(lowest).any()


def refuse_what_is_not_finite(net: nn.Module) -> None:
    """Check a trained ``net`` before its conversion: integers have no NaN, and would hide it.

    Raises:
        UserError: a weight, a batch-norm's statistic or a scale of it is NaN or infinite.
    """
    ours = (".scale", ".running_mean", ".running_var")
    buffers = [(name, value) for name, value in net.named_buffers() if name.endswith(ours)]
    for name, value in [*net.named_parameters(), *buffers]:
        if not value.isfinite().all():
            raise UserError(
                f"{name!r} is NaN or infinite, so there is nothing to convert to INT8. Either "
                "training has diverged: lower the learning rate; or an image holds such a value: "
                "mend that. Go on from an earlier checkpoint."
            )


def batch_norm_weights(net: nn.Module) -> list[Tensor]:
    """The weights of all batch-norms: fusing replaces the modules, but keeps these objects."""
    return [module.weight for module in net.modules() if isinstance(module, _BatchNorm)]


def copies_to_compare(
    float_net: nn.Module, prepared: nn.Module, weights: list[Tensor]
) -> tuple[nn.Module, nn.Module]:
    """Copies of both networks, with the same random statistics and weights in each batch-norm.

    As initialised, a batch-norm is nearly the identity, or zero: no error in fusing it would show.

    Args:
        float_net: the network before.
        prepared: the same after, of the same Parameters.
        weights: of the network before, see ``batch_norm_weights``.
    """
    number = {id(weight): index for index, weight in enumerate(weights) if weight is not None}
    before, after = copy.deepcopy(float_net), copy.deepcopy(prepared)
    for index, batch_norm in enumerate(x for x in before.modules() if isinstance(x, _BatchNorm)):
        _randomise(batch_norm, index)
    for original, copied in zip(prepared.modules(), after.modules(), strict=True):
        if isinstance(copied, _BatchNorm) and copied.weight is not None:
            _randomise(copied, number[id(original.weight)])
    return before, after


@torch.no_grad()
def _randomise(batch_norm: _BatchNorm, seed: int) -> None:
    if batch_norm.weight is None or batch_norm.running_mean is None:
        return
    generator = torch.Generator().manual_seed(seed)
    like = torch.rand(4, batch_norm.num_features, generator=generator).to(batch_norm.weight.device)
    batch_norm.weight.copy_(0.5 + like[0])
    batch_norm.bias.copy_(like[1] - 0.5)
    batch_norm.running_mean.copy_(like[2] - 0.5)
    batch_norm.running_var.copy_(0.5 + like[3])  # type: ignore[union-attr]


def check_at_first_forward(net: nn.Module, networks: tuple[nn.Module, nn.Module]) -> None:
    """Let the first real input of ``net`` show whether fusing has changed the function.

    Args:
        networks: the float one and the prepared one, as ``copies_to_compare`` gives them.
    """
    to_check = [networks]

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        while to_check:  # a deep copy of the module may have this hook still
            check_same_function(*to_check.pop(), args, kwargs)

    handle = net.register_forward_pre_hook(check, with_kwargs=True)


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
        UserError: an optional argument is given that was left out when the network was traced, or
            the other way round; or batch-norm does not normalise what a linear layer gives.
        RuntimeError: an output differs by more than float32 rounding explains.
    """

    def few(value: Any, count: int | None = 8) -> Any:
        if isinstance(value, Tensor):
            value = value[:count].cpu() if value.dim() else value.cpu()
            return value.float() if value.is_floating_point() else value
        return value

    def outputs(net: nn.Module) -> list[Tensor]:
        net = copy.deepcopy(net).cpu().float().eval()
        net.apply(tq.disable_observer)
        net.apply(tq.disable_fake_quant)
        for module in net.modules():
            if isinstance(module, LinearBn1d):
                module.register_forward_pre_hook(_refuse_more_than_features)
        with torch.random.fork_rng():  # some networks draw numbers in evaluation, too
            torch.manual_seed(0)
            args, kwargs = copy.deepcopy((few_args, few_kwargs))  # it may work in place
            found = net(*args, **kwargs)
        return [x for x in tree_leaves(found) if isinstance(x, Tensor)]

    few_args, few_kwargs = tree_map(few, (args, kwargs))
    with torch.autocast("cpu", enabled=False):
        try:
            expected = outputs(float_net)
        except Exception:  # not every tensor has the batch first
            few_args, few_kwargs = tree_map(lambda value: few(value, None), (args, kwargs))
            expected = outputs(float_net)
        try:
            found = outputs(prepared)
        except UserError:
            raise
        except Exception as error:  # what a graph raises that lacks an input, or has one too many
            raise UserError(
                f"{type(float_net).__name__} is called with other optional arguments than it was "
                f"traced for: {type(error).__name__}: {error}. Wrap it in a module whose forward "
                "takes just the tensors that your training step passes."
            ) from error
        for before, after in zip(expected, found, strict=True):
            difference = (before - after).abs().max().item()
            # not `>`: a NaN must fail as well
            if not difference <= 1e-3 * max(1.0, before.abs().max().item()):
                raise RuntimeError(
                    f"the fused network does not compute what {type(float_net).__name__} computed: "
                    f"outputs differ by {difference:.2g}. A tensor changed in place through a view "
                    "does that, or a module with state that is called twice."
                )


def _refuse_more_than_features(module: nn.Module, args: tuple[Any, ...]) -> None:
    if args[0].dim() > 2:
        raise UserError(
            f"a batch-norm behind a linear layer gets {args[0].dim()} dimensions here: it "
            "normalises the second, the layer's integer form the last. Give `fuse=[...]` without "
            "this pair, or `fuse=[]`."
        )
