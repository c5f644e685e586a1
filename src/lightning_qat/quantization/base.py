"""What quantisation aware training and post-training quantisation share: prepare, then convert."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.ao import quantization as tq

from lightning_qat.checkpoint import best_file, best_weights, read_checkpoint, state_dict
from lightning_qat.errors import UserError
from lightning_qat.quantization.bias import round_biases, warn_of_large_biases
from lightning_qat.quantization.check import (
    batch_norm_weights,
    check_at_first_forward,
    copies_to_compare,
    has_run,
    refuse_unobserved,
    unobserved,
)
from lightning_qat.quantization.compatibility import (
    average_integers_as_integers,
    is_a,
    refuse_overlap,
    refuse_what_cannot_be_prepared,
    refuse_what_cannot_work,
    warn_of_learned_scales,
)
from lightning_qat.quantization.convert import Int8Model, convert
from lightning_qat.quantization.learned_scale import follow_optimizers, learned_scales
from lightning_qat.quantization.prepare import is_prepared, prepare_qat
from lightning_qat.quantization.resolve import describe, resolve_overrides, resolve_qconfig


class QuantizationCallback(pl.Callback):
    """Prepares ``target`` when ``fit`` sets up, and holds a converted copy when it has ended.

    Preparation happens before Lightning restores a checkpoint, builds optimizers and wraps the
    module for DDP: so a checkpoint of a prepared network loads, and learnable scales get
    optimised. Observers are off whenever no training step runs.

    With several processes, rank 0's statistics count, for observers as for batch-norm: DDP hands
    its buffers out before each training step, and this callback before validation and when ``fit``
    ends. So all processes validate, and end, with the same scales.

    Args:
        qconfig: a name (see ``lightning_qat.quantization.QCONFIGS``) or a ``QConfig``.
        target: dotted name of the submodule to quantise.
        overrides: another qconfig for some layers, by their name in ``target`` (which covers what
            is below it; ``layer_damage`` lists them) or by their type; None keeps them in float.
        only: the one layer, or part, that is quantised, as to see what it costs; None = all.
        fuse: lists of names of modules to fuse; None = all that can be fused.
        allow_saturation: permit a qconfig whose sums this CPU's kernels cannot hold.

    Attributes:
        in_float: what has stayed in float in a prepared ``target``, by name, and why.
        networks: after ``fit``, ``target`` as ``"fp32"`` (as it was before; not where it came
            fake-quantised), ``"fake_quant"`` (trained) and ``"int8"`` (converted): modules on the
            CPU, in eval mode.

    Raises:
        UserError: a qconfig that cannot be used here. It is a ValueError.
    """

    def __init__(
        self,
        qconfig: str | tq.QConfig = "x86",
        target: str = "net",
        *,
        overrides: Mapping[Any, str | tq.QConfig | None] | None = None,
        only: str | None = None,
        fuse: Sequence[Sequence[str]] | None = None,
        allow_saturation: bool = False,
    ) -> None:
        self.qconfig, self.engine = resolve_qconfig(qconfig, allow_saturation)
        self.overrides = resolve_overrides(overrides or {}, self.engine, allow_saturation)
        if only is not None:
            self.overrides = {"": None, only: self.qconfig, **self.overrides}
        self.target = target
        self.fuse = fuse
        self.in_float: dict[str, str] = {}
        self.networks: dict[str, nn.Module] = {}
        self._scheme = {"qconfig": describe(self.qconfig), "overrides": describe(self.overrides)}
        self._to_check: tuple[nn.Module, nn.Module] | None = None
        self._all_observed = False
        self._best_before: tuple[str, float] | None = None

    @property
    def int8_model(self) -> Int8Model:
        """The converted network, on the CPU: takes what ``target`` takes, gives what it gives."""
        if "int8" not in self.networks:
            raise RuntimeError("there is no INT8 model yet: it is made when `trainer.fit` ends.")
        return self.networks["int8"]  # type: ignore[return-value]

    def load(self, pl_module: pl.LightningModule, ckpt_path: str | Path) -> pl.LightningModule:
        """Load a checkpoint of a quantisation run into a fresh module, to test, predict or convert.

        Args:
            pl_module: as it was given to ``fit``; is changed in place.
            ckpt_path: a checkpoint that was written while this kind of callback, with the same
                arguments, was at work. Nothing in it is executed.

        Returns:
            ``pl_module``, fake-quantised; ``int8_model`` is converted from it.

        Raises:
            UserError: the file is missing or damaged, or of another network or qconfig.
        """
        hint = "name a checkpoint that a fit with this callback has written."
        weights = state_dict(read_checkpoint(ckpt_path, hint), ckpt_path, hint)
        quantised = [name for name in weights if "fake_quant" in name]
        if not any(map(self._is_below, quantised)):
            raise UserError(f"{ckpt_path} holds no fake-quantised {self.target!r}: {hint}")
        if not self._has_target(pl_module):
            pl_module.configure_model()
        self._prepare(pl_module)
        other = f"{ckpt_path} holds another network than this {type(pl_module).__name__}"
        try:
            missing, unexpected = pl_module.load_state_dict(weights, strict=False)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{other}: {str(error)[:300]}") from error
        # the targets of other callbacks may be float still: they get their turn
        others = {name.partition(".")[0] for name in quantised if not self._is_below(name)}
        wrong = [
            name
            for name in missing + unexpected
            if self._is_below(name) or name.partition(".")[0] not in others
        ]
        if wrong:
            raise UserError(f"{other}: they differ in {', '.join(wrong[:5])}.")
        if unobserved(self._network(pl_module)):
            raise UserError(f"{ckpt_path} is from before the first training step: {hint}")
        self._network(pl_module).apply(tq.disable_observer)
        self._to_check = None
        self.networks.pop("fp32", None)  # as the fresh module came: not what was trained
        self._convert(copy.deepcopy(self._network(pl_module)))
        return pl_module

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace ``target`` by its fused, fake-quantised form; a second ``fit`` goes on with it.

        A network that the module builds in its own ``setup`` or ``configure_model`` is replaced as
        soon as it is there.

        Raises:
            UserError: there is no such submodule, or it cannot be quantised.
        """
        if stage != "fit":
            return
        refuse_what_cannot_work(self, trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, QuantizationCallback) and other is not self:
                refuse_overlap(self.target, other.target)
        if self._has_target(pl_module):
            self._prepare(pl_module)
            return

        def configure_model() -> None:
            del pl_module.configure_model  # this stands in for the module's own, once
            pl_module.configure_model()
            self._prepare(pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the sanity check: it validates."""
        self._all_observed = False
        for name in ("fake_quant", "int8"):  # of an earlier fit
            self.networks.pop(name, None)
        self._best_before = None if trainer.ckpt_path else best_file(trainer)
        self._network(pl_module).apply(tq.disable_observer)
        if self._to_check is not None:
            check_at_first_forward(self._network(pl_module), self._to_check)
            self._to_check = None
        warn_of_learned_scales(trainer, self._network(pl_module))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_a(callback, "WeightAveraging"):
                average_integers_as_integers(callback)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Neither validation nor a later ``test`` may move a scale.

        Raises:
            UserError: the first step that uses the network has shown nothing to some observer, or
                no step of the first epoch uses it.
        """
        net = self._network(pl_module).apply(tq.disable_observer)
        if not self._all_observed:
            if not has_run(net) and not trainer.is_last_batch:
                return  # a step may do without the network, as a GAN's do in turns
            refuse_unobserved(net, self.target)
            self._all_observed = True
            # each process has initialised them by its own images
            self._take_from_rank_0(trainer, [scale.data for scale in learned_scales(net)])
        follow_optimizers(net)
        if trainer.is_last_batch:  # what is validated and saved after an epoch
            self._round_biases(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every process validates the same network."""
        self._take_from_rank_0(trainer, self._network(pl_module).buffers())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """While the processes can still talk."""
        self._round_biases(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert a copy; ``target`` itself stays the trained, fake-quantised network."""
        fake_quantised = copy.deepcopy(self._network(pl_module))
        if unobserved(fake_quantised):
            rank_zero_warn("no training step has run, so there is nothing to convert to INT8.")
            return
        best = best_file(trainer)
        if best is not None and best == self._best_before:
            rank_zero_warn(
                "the best checkpoint is from an earlier fit with the same ModelCheckpoint: the "
                "last weights are converted instead. Give each fit its own."
            )
        elif best is not None:
            fake_quantised.load_state_dict(best_weights(trainer, best[0], self.target))
        self._convert(fake_quantised)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """A later ``test`` may not move a scale either."""
        if self._has_target(pl_module):
            self._network(pl_module).apply(tq.disable_observer)

    def _convert(self, fake_quantised: nn.Module) -> None:
        fake_quantised.cpu().eval().apply(tq.disable_observer)
        round_biases(fake_quantised)  # a checkpoint may be from the middle of an epoch
        warn_of_large_biases(fake_quantised)
        self.networks["fake_quant"] = fake_quantised
        self.networks["int8"] = convert(fake_quantised, self.engine)

    def _round_biases(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # DDP by itself leaves the last step's apart, and all of them in manual optimisation (PTQ)
        self._take_from_rank_0(trainer, self._network(pl_module).buffers())
        if self._all_observed:
            round_biases(self._network(pl_module))

    @staticmethod
    def _take_from_rank_0(trainer: pl.Trainer, tensors: Iterable[Tensor]) -> None:
        if trainer.world_size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def _prepare(self, pl_module: pl.LightningModule) -> None:
        net = self._network(pl_module)
        refuse_what_cannot_be_prepared(net, self.target)
        if is_prepared(net):
            scheme = getattr(net, "scheme", None)
            if scheme != self._scheme:
                raise UserError(
                    f"target={self.target!r} is fake-quantised already, as {scheme}, and this "
                    f"callback has {self._scheme}: train on with the same, or start from a float "
                    "network."
                )
            self.in_float = net.in_float  # type: ignore[assignment]
            return
        try:
            float_net = copy.deepcopy(net).eval()
        except RuntimeError as error:
            raise UserError(
                f"target={self.target!r} cannot be copied: {error} Weights that a hook computes do "
                "that, as of torch.nn.utils.weight_norm and prune: make them permanent "
                "(remove_weight_norm, prune.remove) or use torch.nn.utils.parametrizations."
            ) from error
        batch_norms = batch_norm_weights(net)
        prepared = prepare_qat(
            net, self.qconfig, self.engine, self.overrides, self.fuse, self._scheme
        )
        self.in_float = prepared.in_float
        # copies: by the time of the first forward, weights may have been restored
        self._to_check = copies_to_compare(float_net, prepared, batch_norms)
        parent, _, name = self.target.rpartition(".")
        setattr(pl_module.get_submodule(parent), name, prepared)
        self.networks["fp32"] = float_net.cpu()

    def _is_below(self, name: str) -> bool:
        return name.startswith(f"{self.target}.")

    def _has_target(self, pl_module: pl.LightningModule) -> bool:
        try:
            pl_module.get_submodule(self.target)
        except AttributeError:
            return False
        return True

    def _network(self, module: pl.LightningModule) -> nn.Module:
        if self._has_target(module):
            return module.get_submodule(self.target)
        names = ", ".join(name for name, _ in module.named_children()) or "none"
        raise UserError(
            f"target={self.target!r}: {type(module).__name__} has no such submodule when `fit` "
            f"starts. It has: {names}. Set `target` to the dotted name of one of them or of a "
            "submodule of theirs."
        )
