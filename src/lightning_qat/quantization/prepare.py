"""Fake-quantize a network in place."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.arithmetic import Quantize
from lightning_qat.quantization.attach import attach
from lightning_qat.quantization.calls import tensors
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.planner import QConfigOf, make_plan
from lightning_qat.quantization.recorder import Recorder


def copy_network(net: nn.Module) -> nn.Module:
    """Return a deep copy, also of a network whose weights a hook computes, as in pruning.

    torch refuses to copy a tensor that has a gradient history.
    """
    computed = [
        (module, name, value)
        for module in net.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        for module, name, value in computed:
            vars(module)[name] = value.detach()
        return copy.deepcopy(net)
    finally:
        for module, name, value in computed:
            vars(module)[name] = value


def prepare(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], qconfig_of: QConfigOf
) -> Quantization:
    """Fake-quantize ``net`` in place, by a plan from one pass in evaluation mode.

    Args:
        net: any network in float, or a prepared network. Known ranges stay.
        args, kwargs: arguments that the network is called with.
        qconfig_of: function that returns the scheme of a layer by its name; None = in float.

    Raises:
        UserError: the inputs do not fit; or a weight is computed from the input; or the network
            uses a tensor again after an in-place change of a layer's or sum's output.
    """
    quantization = attach(net)
    modes = {module: module.training for module in net.modules()}
    generator = torch.random.get_rng_state()
    net.eval()
    try:
        recorder = Recorder(net, quantization.path)
        output = _run(quantization, recorder, args, kwargs)
        quantization.build(make_plan(recorder, qconfig_of))
        quantization._is_identity = True
        again = _run(quantization, Quantize(quantization), args, kwargs)
    finally:
        quantization._is_identity = False
        torch.random.set_rng_state(generator)
        for module, training in modes.items():
            module.training = training
    for before, after in zip(tensors(output), tensors(again), strict=True):
        if not torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UserError(
                f"{type(net).__name__} changes a tensor in place and uses it again without the "
                "result, as in `x.add_(y)` without `x =`: fake quantization would be lost there. "
                "Write `x = x + y`."
            )
    quantization.is_ready = not quantization.unobserved()
    return quantization


def _run(quantization: Quantization, mode: Any, args: Any, kwargs: Any) -> Any:
    try:
        return quantization.run_in(mode, *copy.deepcopy(args), **copy.deepcopy(kwargs))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{type(quantization.net).__name__} cannot be run on its example inputs: {error}. Give "
            "the callback `example_inputs=` that the network takes."
        ) from error
