"""What cannot work with quantisation, beside it, or only if something is done about it."""

import functools
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.ao import quantization as tq
from torch.optim.swa_utils import AveragedModel

from lightning_qat.errors import UserError
from lightning_qat.quantization.convert import is_converted
from lightning_qat.quantization.fake_quantize import (
    KernelRangeFakeQuantize,
    SymmetricFakeQuantize,
)
from lightning_qat.quantization.learned_scale import LearnedScaleFakeQuantize, learned_scales


def is_a(callback: Any, name: str) -> bool:
    """Whether ``callback`` is Lightning's callback ``name``, of whichever of its two packages."""
    return any(base.__name__ == name for base in type(callback).__mro__)


def refuse_what_cannot_work(ours: pl.Callback, trainer: pl.Trainer) -> None:
    """Check the precision and the other callbacks of a trainer.

    Raises:
        UserError: one of them cannot work beside ``ours``, or not in this order.
    """
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise UserError(
            f"precision={trainer.precision!r}: scales and fake-quantisers are float32. Use "
            "'32-true' or 'bf16-mixed'."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for index, other in enumerate(callbacks):
        name = type(other).__name__
        if is_a(other, "LearningRateFinder") or is_a(other, "BatchSizeFinder"):
            raise UserError(
                f"{name} runs training steps of its own without callbacks, so no scale would ever "
                "be observed: find the value on the float network, without this callback."
            )
        averages = is_a(other, "WeightAveraging") or is_a(other, "StochasticWeightAveraging")
        if averages and index < callbacks.index(ours):
            raise UserError(
                f"{name} copies the network before it is fake-quantised: put "
                f"{type(ours).__name__} before it in the list of callbacks."
            )


def refuse_overlap(target: str, other: str) -> None:
    """Check that two callbacks quantise different networks.

    Raises:
        UserError: one target is the other, or a part of it.
    """
    first, second = sorted((target, other), key=len)
    if first == second or second.startswith(f"{first}."):
        raise UserError(
            f"two callbacks would quantise {second!r} (targets {first!r} and {second!r}): keep one "
            "of them, or give them targets that do not overlap."
        )


def refuse_what_cannot_be_prepared(net: nn.Module, target: str) -> None:
    """Check that ``net`` is a network in float whose layers can be seen.

    Raises:
        UserError: it is not.
    """
    if hasattr(net, "_orig_mod"):
        raise UserError(
            f"target={target!r} has been compiled, which hides its layers: compile the "
            "LightningModule instead, `trainer.fit(torch.compile(module))`, or not at all."
        )
    if is_converted(net):
        raise UserError(
            f"target={target!r} is an INT8 model, whose integers cannot be trained: fit "
            "the float network that it was made of."
        )


def warn_of_learned_scales(trainer: pl.Trainer, net: nn.Module) -> None:
    """Say where an optimizer would leave learned scales alone, or draw them to 0."""
    scales = {id(scale) for scale in learned_scales(net)}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    of_scale = {id(x): group for group in groups for x in group["params"] if id(x) in scales}
    advice = "give `learned_scales(self)` (lightning_qat.quantization) a group of their own"
    if len(of_scale) < len(scales):
        rank_zero_warn(f"no optimizer has all learned scales of this qconfig: {advice}.")
    if any(group.get("weight_decay") for group in of_scale.values()):
        rank_zero_warn(f"weight decay draws learned scales to 0: {advice} with weight_decay=0.")


def average_integers_as_integers(callback: Any) -> None:
    """Keep Lightning's weight averaging away from zero points and switches.

    As an integer, an average of 64 and 64 that is 63.99 becomes 63, one less every step. A zero
    point follows from the averaged range instead, and so does a scale, which may have to be a power
    of two. Switches are not averaged.
    """
    averaged: Any = callback._average_model
    if averaged is None:
        return
    update_parameters: Any = functools.partial(AveragedModel.update_parameters, averaged)

    def update(model: nn.Module) -> None:
        update_parameters(model)
        for mean, current in zip(averaged.module.modules(), model.modules(), strict=True):
            if isinstance(mean, tq.FakeQuantizeBase):
                for x, now in zip(mean.buffers(), current.buffers(), strict=True):
                    if not x.is_floating_point():
                        x.copy_(now)
                if isinstance(mean, LearnedScaleFakeQuantize):
                    mean.follow_parameters()
                    continue
                observer: Any = getattr(mean, "activation_post_process", None)
                if hasattr(observer, "min_val") and observer.min_val.numel():
                    if isinstance(mean, KernelRangeFakeQuantize | SymmetricFakeQuantize):
                        mean.follow_range()
                    else:  # torch's own
                        zero_point: Any = mean.zero_point
                        zero_point.copy_(observer.calculate_qparams()[1])

    averaged.update_parameters = update
