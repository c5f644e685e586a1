"""Fake-quantize a network and keep the user's object.

Hooks track which module runs. A wrapper of ``forward`` runs the network in a mode that sees its
torch functions. Modules, parameters, their order and the keys of ``state_dict`` do not change.
Ranges and scales are stored outside the network, in a ``Quantization``.
"""

import copy
import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.arithmetic import Quantize
from lightning_qat.quantization.calls import tensors
from lightning_qat.quantization.fake_quantize import (
    ActivationFakeQuantize,
    FakeQuantize,
    WeightFakeQuantize,
)
from lightning_qat.quantization.learned_scale import LearnedScaleFakeQuantize
from lightning_qat.quantization.plan import Plan, QConfigOf, Recorder, make_plan


class Quantization(nn.Module):
    """The plan of a network, its fake-quantizers, and the state of both.

    Its tensors are not part of any ``state_dict``. ``scales`` and ``load_scales`` carry them into
    and out of checkpoints.

    Attributes:
        plan: the places where the network is quantized.
        path: the names of the running modules; empty if the network does not run.
        target: the dotted name of the network in its LightningModule.
        scheme: the callback's arguments, in words.
        example: positional and keyword arguments that the network takes.
        numbers: during lowering: scale and zero point of each activation.
        lowered: during lowering: the integers and scales of each layer, by site.
        is_ready: True if all ranges are known. Before that, evaluation is in float.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        # not a submodule, because the network holds this object
        object.__setattr__(self, "_net", (net,))
        self.plan = Plan()
        self.path: list[str] = []
        self.target = ""
        self.scheme: dict[str, str] = {}
        self.example: Any = None
        self.numbers: dict[str, tuple[float, int]] | None = None
        self.lowered: dict[str, tuple[Any, ...]] = {}
        self.is_ready = False
        self._observes = self._is_identity = False
        self._entered: Quantize | None = None
        self._unplanned: set[str] = set()
        self._first_unplanned: set[str] | None = None
        self.activations = nn.ModuleDict()
        self.weights = nn.ModuleDict()
        self.register_load_state_dict_post_hook(_not_missing)

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self._net[0]  # type: ignore[index,return-value]

    # the state of the network -----------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        """True if the network computes the same numbers as integer kernels."""
        is_lowered = self.numbers is not None
        return not (self.net.training or self._observes or self._is_identity or is_lowered)

    @property
    def is_active(self) -> bool:
        """True if the network is quantized: all ranges are known, or it observes them."""
        return self.is_ready or self._observes or self._is_identity

    def observe(self, enabled: bool) -> None:
        """Let data change the ranges, or not."""
        self._observes = enabled
        for module in self.modules():
            if isinstance(module, FakeQuantize):
                module.observes = enabled

    def activation(self, name: str) -> Any:
        """Return the fake-quantizer of activations with this name."""
        return self.activations[_key(name)]

    def weight(self, name: str) -> Any:
        """Return the fake-quantizer of weights with this name."""
        return self.weights[_key(name)]

    def fake_quant(self, name: str, x: Tensor) -> Tensor:
        """Fake-quantize an activation."""
        return x.clone() if self._is_identity else self._run(self.activation(name), x)

    def fake_quant_weight(self, name: str, weight: Tensor) -> Tensor:
        """Fake-quantize a weight."""
        if not self._is_identity:
            return self.weight(name)(weight)
        if not self.weight(name).is_observed():
            self.weight(name).initialize(weight.detach().float())
        return weight

    def _run(self, fake_quant: Any, x: Tensor) -> Tensor:
        # Gradient checkpointing runs forward again inside backward, on data that was observed
        # before.
        if self._observes and not torch.compiler.is_compiling() and _is_backward():
            fake_quant.observes = False
            rounded = fake_quant(x)
            fake_quant.observes = True
            return rounded
        return fake_quant(x)

    def meet_unplanned(self, site: str) -> None:
        """Note a layer that the recorded pass did not have.

        Raises:
            UserError: evaluation calls the layer, so the INT8 model would not have it.
        """
        if site in self.plan.known or torch.compiler.is_compiling():
            return
        if not self.net.training:
            raise UserError(f"evaluation calls {site!r}, {_CHANGES}")
        self._unplanned.add(site)

    def check_layers(self) -> None:
        """Check that each training step calls the same layers. It may call more than evaluation.

        Raises:
            UserError: some steps call other layers.
        """
        if not self.net.training or torch.compiler.is_compiling():
            return
        if self._first_unplanned is None:
            self._first_unplanned = self._unplanned
        changed = self._unplanned ^ self._first_unplanned
        self._unplanned = set()
        if changed:
            raise UserError(f"training calls {min(changed)!r} in some steps only, {_CHANGES}")

    def enter(self, name: str) -> None:
        """Note that a module starts. A module that runs alone is quantized alone."""
        if not self.path and self.is_active:
            self._entered = Quantize(self)
            self._entered.__enter__()
        self.path.append(name)

    def leave(self) -> None:
        """Note that a module has ended."""
        if self.path:
            self.path.pop()
        if not self.path and self._entered is not None:
            self._entered.__exit__(None, None, None)
            self._entered = None

    def run_in(self, mode: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network's own ``forward`` in a mode that sees its calls, without gradients."""
        forward: Any = self.net.forward
        self.path[:] = [""]
        try:
            with torch.no_grad(), mode:
                return forward.original(*args, **kwargs)
        finally:
            self.path[:] = []

    # tensors ----------------------------------------------------------------------------------

    def build(self, plan: Plan) -> None:
        """Use another plan. Keep the fake-quantizers that fit it."""
        self.plan = plan
        device = next((x.device for x in self.net.parameters()), torch.device("cpu"))
        made: dict[str, nn.Module] = {
            _key(name): LearnedScaleFakeQuantize(q) if q.is_learned else ActivationFakeQuantize(q)
            for name, q in plan.activations.items()
        }
        self.activations = nn.ModuleDict(made | _fitting(made, self.activations)).to(device)
        made = {
            _key(name): (LearnedScaleFakeQuantize if q.is_learned else WeightFakeQuantize)(q, *axis)
            for name, (q, *axis) in plan.weights.items()
        }
        self.weights = nn.ModuleDict(made | _fitting(made, self.weights)).to(device)
        self.is_ready = not self.unobserved()

    def unobserved(self) -> list[str]:
        """Return the names of the fake-quantizers that have no range yet."""
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, FakeQuantize) and not module.is_observed()
        ]

    @property
    def count(self) -> int:
        """Return the number of fake-quantizers that need training data."""
        return sum(isinstance(x, FakeQuantize) and not x.is_known_at_start for x in self.modules())

    def scales(self) -> dict[str, Tensor]:
        """Return copies of all ranges and scales, by name."""
        return {
            name: tensor.detach().clone()
            for name, tensor in nn.Module.state_dict(self, keep_vars=True).items()
        }

    def load_scales(self, scales: dict[str, Tensor]) -> None:
        """Load ranges and scales that ``scales`` returned.

        Raises:
            UserError: they belong to another network or scheme.
        """
        own: dict[str, Tensor] = nn.Module.state_dict(self, keep_vars=True)
        wrong = set(own) ^ set(scales) or {
            name for name in own if own[name].shape != scales[name].shape
        }
        if wrong:
            raise UserError(
                f"these scales are of another network or qconfig: they differ in {sorted(wrong)[0]}"
                f" ({len(wrong)} in all). Give the callback the network and arguments that the "
                "checkpoint was written with."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(scales[name])
        for module in self.modules():
            if isinstance(module, LearnedScaleFakeQuantize):
                module.is_learning = bool(module.is_initialized)
        self.is_ready = not self.unobserved()

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return nothing, so that a checkpoint has only the keys of the float network."""
        return OrderedDict() if destination is None else destination


def _not_missing(module: nn.Module, incompatible: Any) -> None:
    """Tell ``load_state_dict`` that a ``Quantization`` has no missing keys."""
    own = tuple(f".{name}" for name in nn.Module.state_dict(module, keep_vars=True))
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.endswith(own)] if own else missing


def _key(name: str) -> str:
    return name.replace(".", "/")  # the name of a submodule has no dots


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _fitting(made: dict[str, nn.Module], present: nn.ModuleDict) -> dict[str, nn.Module]:
    """Return the present fake-quantizers that can replace the new ones."""
    return {
        key: present[key]
        for key, module in made.items()
        if key in present and _shapes(present[key]) == _shapes(module)
    }


def _shapes(module: nn.Module) -> list[Any]:
    return [type(module), *((name, x.shape) for name, x in module.state_dict().items())]


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


_CHANGES = (
    "which it did not call when the network was prepared: a network that calls other layers in "
    "each step has no single INT8 model. Point `target` at a part that always runs the same "
    "layers, or give `example_inputs` that are like its real inputs."
)
