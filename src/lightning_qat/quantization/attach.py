"""Attach quantization to a network, and keep the user's object.

Hooks track which module runs. A wrapper of ``forward`` runs the network in a mode that sees its
torch functions. Modules, parameters, their order and the keys of ``state_dict`` do not change.
Ranges and scales are stored outside the network, in a ``Quantization``.
"""

import inspect
from typing import Any

from torch import nn

from lightning_qat.quantization.arithmetic import Quantize
from lightning_qat.quantization.fake_quantize import FakeQuantize
from lightning_qat.quantization.network import Quantization


class QuantizedForward:
    """The ``forward`` of a quantized network. It can be copied and pickled with the network."""

    def __init__(self, quantization: Quantization, forward: Any = None) -> None:
        self.quantization = quantization
        self.forward = forward  # of the instance, if it has one

    @property
    def original(self) -> Any:
        """The network's own ``forward``."""
        net = self.quantization.net
        return self.forward or type(net).forward.__get__(net)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the network's own ``forward``."""
        return inspect.signature(self.original)

    @property
    def __code__(self) -> Any:
        """The code of the network's own ``forward``, which torch.export reads."""
        return self.original.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in its quantized form."""
        quantization = self.quantization
        path = quantization.path
        outside = list(path)
        path[:] = [""]
        try:
            if not quantization.is_active:
                return self.original(*args, **kwargs)
            with Quantize(quantization):
                output = self.original(*args, **kwargs)
            quantization.check_layers()
            return output
        finally:
            path[:] = outside


class _Enter:
    """Add the running module to the path. This is a forward pre-hook.

    A module that runs outside the network's ``forward`` is quantized alone, for example if another
    method of the network calls it.
    """

    def __init__(self, quantization: Quantization, name: str) -> None:
        self.quantization, self.name = quantization, name

    def __call__(self, *_: Any) -> None:
        self.quantization.enter(self.name)


class _Leave:
    """Remove the module from the path. This is the forward hook that belongs to ``_Enter``."""

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def __call__(self, *_: Any) -> None:
        self.quantization.leave()


class _Apply:
    """The ``_apply`` of a quantized network. ``to`` and similar methods call it for scales, too."""

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        net = self.quantization.net
        type(net)._apply(net, fn, recurse)
        self.quantization._apply(fn)
        return net


def quantization_of(net: nn.Module) -> Quantization | None:
    """Return the quantization of ``net``, or None if it is a float network."""
    forward = vars(net).get("forward")
    return forward.quantization if isinstance(forward, QuantizedForward) else None


def quantized_networks(module: nn.Module) -> list[Quantization]:
    """Return the quantizations of all quantized networks in ``module``."""
    found = [quantization_of(x) for x in module.modules()]
    return [x for x in found if x is not None]


def attach(net: nn.Module) -> Quantization:
    """Return the quantization of ``net``. If it has none, give it one without a plan.

    Also track modules that were added to the network since then.
    """
    quantization = quantization_of(net)
    if quantization is None:
        quantization = Quantization(net)
        net.forward = QuantizedForward(quantization, vars(net).get("forward"))  # type: ignore[assignment]
        net._apply = _Apply(quantization)  # type: ignore[assignment,method-assign]
    for name, module in net.named_modules():
        follows = any(
            isinstance(hook, _Enter) and hook.quantization is quantization
            for hook in module._forward_pre_hooks.values()
        )
        if name and not follows and not isinstance(module, Quantization | FakeQuantize):
            module.register_forward_pre_hook(_Enter(quantization, name))
            module.register_forward_hook(_Leave(quantization), always_call=True)
    return quantization


def detach(net: nn.Module) -> nn.Module:
    """Turn a quantized network into a float network, in place. Its weights stay as trained."""
    quantization = quantization_of(net)
    if quantization is None:
        return net
    forward = vars(net)["forward"].forward
    del net.forward, net._apply
    if forward is not None:
        net.forward = forward
    for module in net.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Enter | _Leave) and hook.quantization is quantization:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
    return net
