"""The state of a quantized network: plan, fake-quantizers, and the mode in which it runs."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.arithmetic import Quantize
from lightning_qat.quantization.fake_quantize import (
    ActivationFakeQuantize,
    FakeQuantize,
    WeightFakeQuantize,
)
from lightning_qat.quantization.learned_scale import LearnedScaleFakeQuantize
from lightning_qat.quantization.plan import Plan


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


_CHANGES = (
    "which it did not call when the network was prepared: a network that calls other layers in "
    "each step has no single INT8 model. Point `target` at a part that always runs the same "
    "layers, or give `example_inputs` that are like its real inputs."
)
