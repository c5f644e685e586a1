"""Refuse networks, callbacks and settings that do not work with quantization."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from lightning_qat.errors import UserError
from lightning_qat.quantization.learned_scale import learned_scales
from lightning_qat.quantization.network import Quantization


def is_a(callback: Any, name: str) -> bool:
    """Return True if ``callback`` is Lightning's callback ``name``, of either package."""
    return any(base.__name__ == name for base in type(callback).__mro__)


def is_int8_model(module: nn.Module) -> bool:
    """Return True where ``module`` is a converted network: it knows the network it was made of."""
    return "source" in getattr(module, "meta", {})


def refuse_other_callbacks(ours: pl.Callback, trainer: pl.Trainer) -> None:
    """Check the precision and the other callbacks of a trainer.

    Raises:
        UserError: one of them does not work with ``ours``, or not in this order.
    """
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise UserError(
            f"precision={trainer.precision!r}: scales and fake-quantizers are float32. Use "
            "'32-true' or 'bf16-mixed'."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for index, other in enumerate(callbacks):
        name = type(other).__name__
        if is_a(other, "LearningRateFinder") or is_a(other, "BatchSizeFinder"):
            raise UserError(
                f"{name} runs training steps of its own without callbacks, so no range would ever "
                "be observed: find the value on the float network, without this callback."
            )
        averages = is_a(other, "WeightAveraging") or is_a(other, "StochasticWeightAveraging")
        if averages and index < callbacks.index(ours):
            raise UserError(
                f"{name} copies the network before it is fake-quantized: put "
                f"{type(ours).__name__} before it in the list of callbacks."
            )


def refuse_overlap(target: str | None, other: str | None) -> None:
    """Check that two callbacks quantize different networks.

    Raises:
        UserError: one target is the same as the other, or a part of it.
    """
    first, second = sorted((target or "", other or ""), key=len)
    if not first or first == second or second.startswith(f"{first}."):
        raise UserError(
            f"two callbacks would quantize {second!r} (targets {target!r} and {other!r}): keep one "
            "of them, or give them targets that do not overlap."
        )


def refuse_what_cannot_be_prepared(net: nn.Module, target: str) -> None:
    """Check that ``net`` is a network in float with visible layers.

    Raises:
        UserError: ``net`` is compiled, or is an INT8 model.
    """
    if hasattr(net, "_orig_mod"):
        raise UserError(
            f"target={target!r} has been compiled, which hides its layers: compile the "
            "LightningModule instead, `trainer.fit(torch.compile(module))`, or not at all."
        )
    if any(is_int8_model(module) for module in net.modules()):
        raise UserError(
            f"target={target!r} is an INT8 model, whose integers cannot be trained: fit "
            "the float network that it was made of."
        )


def refuse_unobserved(unobserved: list[str], target: str) -> None:
    """Check that each fake-quantizer has a range.

    Raises:
        UserError: a fake-quantizer has observed no data.
    """
    if unobserved:
        raise UserError(
            f"training has run without the observers of {unobserved[0]!r} ({len(unobserved)} in "
            "total), so its scale is unknown. There are three possible reasons. "
            "freeze_observer_epoch has come before the observers saw data: raise it. Or "
            f"training_step does not use {target!r} but another name of its layers: set `target` "
            f"to that name. Or training_step does not use {target!r} in the first epoch: use it "
            "there."
        )


def refuse_what_is_not_finite(net: nn.Module, quantization: Quantization) -> None:
    """Check a trained ``net`` before its conversion: integers cannot show a NaN.

    Raises:
        UserError: a weight, a statistic of batch-norm or a scale is NaN or infinite.
    """
    buffers = [
        (n, x) for n, x in net.named_buffers() if n.endswith(("running_mean", "running_var"))
    ]
    for name, value in [*net.named_parameters(), *buffers, *quantization.scales().items()]:
        if not value.isfinite().all():
            raise UserError(
                f"{name!r} is NaN or infinite, so there is nothing to convert to INT8. Either "
                "training has diverged: lower the learning rate; or an image holds such a value: "
                "correct the image. Then continue from an earlier checkpoint."
            )


def warn_of_learned_scales(trainer: pl.Trainer, quantization: Quantization) -> None:
    """Warn if an optimizer does not train learned scales, or if weight decay moves them to 0."""
    scales = {id(scale) for scale in learned_scales(quantization)}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    of_scale = {id(x): group for group in groups for x in group["params"] if id(x) in scales}
    advice = "give `learned_scales(self)` (lightning_qat.quantization) a group of their own"
    if len(of_scale) < len(scales):
        rank_zero_warn(f"no optimizer has all learned scales of this qconfig: {advice}.")
    if any(group.get("weight_decay") for group in of_scale.values()):
        rank_zero_warn(f"weight decay moves learned scales to 0: {advice} with weight_decay=0.")
