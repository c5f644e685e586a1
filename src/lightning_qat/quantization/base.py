"""The common part of quantization-aware training and post-training quantization."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.attach import attach, quantization_of
from lightning_qat.quantization.checkpoints import (
    KEY,
    SaveScales,
    averaged_modules,
    below,
    best_file,
    load_best,
    read_checkpoint,
    restore_quantization,
    state_dict,
    state_of_target,
)
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.example import find_example, has_forward
from lightning_qat.quantization.guards import (
    is_int8_model,
    refuse_other_callbacks,
    refuse_overlap,
    refuse_unobserved,
    refuse_what_cannot_be_prepared,
    refuse_what_is_not_finite,
    warn_of_learned_scales,
)
from lightning_qat.quantization.learned_scale import LearnedScaleFakeQuantize, learned_scales
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.overrides import Overrides
from lightning_qat.quantization.prepare import copy_network, prepare
from lightning_qat.quantization.qconfig import describe, resolve_overrides, resolve_qconfig

log = logging.getLogger(__name__)


class QuantizationCallback(pl.Callback):
    """Prepare ``target`` when ``fit`` begins, and hold a converted copy after its end.

    Preparation comes before Lightning restores a checkpoint, builds optimizers and wraps the module
    for DDP. So learned scales are optimized. Ranges change only in training steps.

    With several processes, the ranges and the batch-norm statistics of rank 0 count. DDP sends its
    buffers to the others before each training step. This callback sends them before validation and
    at the end of ``fit``, so that all processes validate and end with the same scales.

    Args:
        qconfig: a name (see ``lightning_qat.qconfigs()``), a ``QConfig`` or torch's ``QConfig``.
        target: dotted name of the submodule to quantize; None = what the LightningModule's own
            ``forward`` runs, or its only network where it has no ``forward``.
        overrides: another qconfig for some layers, by type or by name in ``target``. A name covers
            all layers below it; ``layer_damage`` lists the names. None keeps the layer in float.
        only: the layer or part that is quantized, for example to measure its damage; None = all.
        example_inputs: the arguments of ``target``: a tensor, a tuple, or a dictionary of keyword
            arguments. None = take ``example_input_array`` or the first training batch.
        allow_saturation: permit a qconfig whose sums this CPU's kernels cannot hold.

    Attributes:
        in_float: the reason for each layer that stays in float, by name.
        networks: after ``fit``, three forms of ``target`` on the CPU, in eval mode: ``"fp32"``
            (before the fit, if it was float then), ``"fake_quant"`` (trained), ``"int8"``
            (converted).

    Raises:
        UserError: a qconfig that cannot be used here. It is a ValueError.
    """

    def __init__(
        self,
        qconfig: Any = "x86",
        target: str | None = None,
        *,
        overrides: Mapping[Any, Any] | None = None,
        only: str | None = None,
        example_inputs: Any = None,
        allow_saturation: bool = False,
    ) -> None:
        self.qconfig = resolve_qconfig(qconfig, allow_saturation)
        self.engine = self.qconfig.engine
        self.overrides = Overrides(
            self.qconfig, resolve_overrides(overrides or {}, self.engine, allow_saturation), only
        )
        self.target = target
        self.example_inputs = example_inputs
        self.in_float: dict[str, str] = {}
        self.networks: dict[str, nn.Module] = {}
        self._scheme = {"qconfig": describe(self.qconfig), "overrides": self.overrides.describe()}
        self._best_before: tuple[str, float] | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint; two targets have two."""
        return f"{type(self).__qualname__}[{self.target}]"

    @property
    def int8_model(self) -> nn.Module:
        """The converted network on the CPU. Its inputs and outputs are those of ``target``."""
        if "int8" not in self.networks:
            raise RuntimeError("there is no INT8 model yet: it is made when `trainer.fit` ends.")
        return self.networks["int8"]

    def load(self, pl_module: pl.LightningModule, ckpt_path: str | Path) -> pl.LightningModule:
        """Load a checkpoint of a quantization run into a fresh module, to test, predict or convert.

        Args:
            pl_module: the module as it was before ``fit``. It is changed in place.
            ckpt_path: a checkpoint of a fit with this kind of callback and the same arguments.
                Nothing in the file is executed.

        Returns:
            ``pl_module``, fake-quantized; ``int8_model`` is converted from it.

        Raises:
            UserError: the file is missing or damaged, or of another network or qconfig.
        """
        checkpoint = read_checkpoint(ckpt_path)
        weights = state_dict(checkpoint, ckpt_path)
        if not self._has_target(pl_module):
            pl_module.configure_model()
        self._restore(pl_module, checkpoint, ckpt_path)
        other = f"{ckpt_path} holds another network than this {type(pl_module).__name__}"
        try:
            missing, unexpected = pl_module.load_state_dict(weights, strict=False)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{other}: {str(error)[:300]}") from error
        if missing or unexpected:
            raise UserError(f"{other}: they differ in {', '.join((missing + unexpected)[:5])}.")
        quantization = self._quantization(pl_module)
        if not quantization.is_ready:
            raise UserError(
                f"{ckpt_path} is from before the first training step: name a later one."
            )
        self.networks.pop("fp32", None)  # as the fresh module came: not what was trained
        self._convert(copy_network(self._network(pl_module)))
        return pl_module

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit, validate, test or predict begins. Prepare ``target`` for a fit.

        If the module makes its network or data in ``setup`` or ``configure_model``, prepare after
        that. A second ``fit`` goes on with the quantized network.

        Raises:
            UserError: there is no such submodule, or it cannot be quantized.
        """
        if stage != "fit":
            return
        refuse_other_callbacks(self, trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, QuantizationCallback) and other is not self:
                refuse_overlap(self.target, other.target)
        is_shown = self.example_inputs is not None or pl_module.example_input_array is not None
        waits = not is_shown and is_overridden("setup", pl_module)
        if self._has_target(pl_module) and not waits:
            self._prepare(trainer, pl_module)
            return

        def configure_model() -> None:
            del pl_module.configure_model  # this stands in for the module's own, once
            pl_module.configure_model()
            self._prepare(trainer, pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called after Lightning has restored the weights. Restore their scales.

        Raises:
            UserError: a fit is continued from a checkpoint without scales.
        """
        path = trainer.ckpt_path or "the checkpoint"
        if KEY not in checkpoint and not trainer.training:
            rank_zero_warn(f"{path} holds no scales, so the float network is used.")
            return
        self._restore(pl_module, checkpoint, path)
        state = checkpoint[KEY][self._target_name(pl_module)]
        if "current_scales" in state and trainer.training:
            name = self._child_name(pl_module)
            for averaged in averaged_modules(trainer):
                averaged.get_submodule(name).load_scales(state["scales"])
            self._quantization(pl_module).load_scales(state["current_scales"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the sanity check. Stop observing, so that it changes no range."""
        for name in ("fake_quant", "int8"):  # of an earlier fit
            self.networks.pop(name, None)
        self._best_before = None if trainer.ckpt_path else best_file(trainer)
        self._quantization(pl_module).observe(False)
        warn_of_learned_scales(trainer, self._quantization(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Called after the optimizer step. Stop observing until the next training step.

        Raises:
            UserError: the first step that uses the network gave some observer no data, or no step
                of the first epoch uses the network.
        """
        quantization = self._quantization(pl_module)
        quantization.observe(False)
        if not quantization.is_ready:
            unobserved = quantization.unobserved()
            if len(unobserved) == quantization.count and not trainer.is_last_batch:
                return  # a GAN, for example, uses each network in every second step
            refuse_unobserved(unobserved, self._target_name(pl_module))
            quantization.is_ready = True
            # each process has initialized them by its own images
            self._take_from_rank_0(trainer, [x.data for x in learned_scales(quantization)])
        for module in quantization.modules():
            if isinstance(module, LearnedScaleFakeQuantize):
                module.follow_optimizer()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before validation. Send the network of rank 0 to all processes."""
        self._share(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the processes end. Send the network of rank 0 to all processes."""
        self._share(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the end of fit. Convert a copy; ``target`` itself stays fake-quantized."""
        if not self._quantization(pl_module).is_ready:
            rank_zero_warn("no training step has run, so there is nothing to convert to INT8.")
            return
        net = copy_network(self._network(pl_module))
        best = best_file(trainer)
        if best is not None and best == self._best_before:
            rank_zero_warn(
                "the best checkpoint is from an earlier fit with the same ModelCheckpoint: the "
                "last weights are converted instead. Give each fit its own."
            )
        elif best is not None:
            checkpoint = load_best(trainer, best[0])
            target = self._target_name(pl_module)
            net.load_state_dict(below(checkpoint["state_dict"], target))
            quantization = quantization_of(net)
            assert quantization is not None
            quantization.load_scales(state_of_target(checkpoint, target, best[0])["scales"])
        self._convert(net)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Called after an error. Stop observing, so that a later ``test`` changes no range."""
        if self._has_target(pl_module):
            quantization = quantization_of(self._network(pl_module))
            if quantization is not None:
                quantization.observe(False)

    def _convert(self, net: nn.Module) -> None:
        net.cpu().eval()
        quantization = quantization_of(net)
        assert quantization is not None
        quantization.observe(False)
        refuse_what_is_not_finite(net, quantization)
        self.networks["fake_quant"] = net
        self.networks["int8"] = convert(net, self.engine)

    def _share(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # DDP does not send the buffers of the last step, nor any in manual optimization (PTQ).
        tensors = [*self._network(pl_module).buffers(), *self._quantization(pl_module).buffers()]
        self._take_from_rank_0(trainer, tensors)

    @staticmethod
    def _take_from_rank_0(trainer: pl.Trainer, tensors: Iterable[Tensor]) -> None:
        if trainer.world_size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net = self._network(pl_module)
        target = self._target_name(pl_module)
        refuse_what_cannot_be_prepared(net, target)
        present = quantization_of(net)
        if present is not None and present.scheme != self._scheme:
            raise UserError(
                f"target={target!r} is quantized already, as {present.scheme}, and this callback "
                f"has {self._scheme}: train on with the same, or start from a float network."
            )
        example = find_example(pl_module, net, self.example_inputs, trainer)
        if present is None:
            self.networks["fp32"] = copy_network(net).cpu().eval()
        quantization = prepare(net, *example, self.overrides.of(net))
        quantization.example = example
        self._register(pl_module, quantization)
        self.overrides.refuse_idle()
        self._say_what_stays_in_float(quantization)

    def _restore(
        self, pl_module: pl.LightningModule, checkpoint: dict[str, Any], path: str | Path
    ) -> None:
        net, target = self._network(pl_module), self._target_name(pl_module)
        state = state_of_target(checkpoint, target, path)
        quantization = attach(net)
        quantization.scheme = self._scheme
        restore_quantization(quantization, state, path)
        self._register(pl_module, quantization)

    def _register(self, pl_module: pl.LightningModule, quantization: Quantization) -> None:
        """Add the scales as a submodule, so that the optimizer, DDP and ``to`` find them."""
        quantization.scheme = self._scheme
        quantization.target = self._target_name(pl_module)
        pl_module.add_module(self._child_name(pl_module), quantization)
        pl_module.on_save_checkpoint = SaveScales(pl_module)  # type: ignore[method-assign]
        self.in_float = quantization.plan.in_float

    def _say_what_stays_in_float(self, quantization: Quantization) -> None:
        plan = quantization.plan
        for reason in dict.fromkeys(plan.in_float.values()):
            names = [name for name, why in plan.in_float.items() if why == reason]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            rank_zero_info(f"In float, {reason}: {', '.join(names[:8])}{more}.")
        if not plan.weights:
            raise UserError(
                f"{type(quantization.net).__name__} calls no layer that could be quantized "
                "(convolution or linear): point `target` at a network that has some."
            )
        share = plan.integer_share()
        rank_zero_info(f"Integer kernels do {share:.1%} of the multiply-adds.")
        if share < 0.9 and not self.overrides.are_given:
            name, work = max(plan.float_work.items(), key=lambda item: item[1])
            rank_zero_warn(
                f"integer kernels do only {share:.0%} of the multiply-adds. The largest part in "
                f"float is {name!r} with {work / 1e6:.1f} million for one sample."
            )

    def _target_name(self, pl_module: pl.LightningModule) -> str:
        if self.target is not None:
            return self.target
        if has_forward(pl_module):
            return ""
        networks = [
            name
            for name, x in pl_module.named_children()
            if any(True for _ in x.parameters()) or is_int8_model(x)
        ]
        networks = [x for x in networks if not isinstance(getattr(pl_module, x), Quantization)]
        if len(networks) == 1:
            return networks[0]
        return "net" if "net" in networks else ""

    def _child_name(self, pl_module: pl.LightningModule) -> str:
        return f"quantization_of_{self._target_name(pl_module).replace('.', '_') or 'self'}"

    def _has_target(self, pl_module: pl.LightningModule) -> bool:
        name = self._target_name(pl_module)
        if not name and not has_forward(pl_module):
            return False
        try:
            pl_module.get_submodule(name)
        except AttributeError:
            return False
        return True

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        if self._has_target(pl_module):
            return pl_module.get_submodule(self._target_name(pl_module))
        names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        raise UserError(
            f"target={self.target!r}: {type(pl_module).__name__} has no such submodule when `fit` "
            f"starts. It has: {names}. Set `target` to the dotted name of one of them or of a "
            "submodule of theirs."
        )

    def _quantization(self, pl_module: pl.LightningModule) -> Quantization:
        found = quantization_of(self._network(pl_module))
        assert found is not None, "prepared when fit set up"
        return found
