"""Lightning's other callbacks: which ones cannot work beside quantisation, and what others need."""

import functools
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.ao import quantization as tq
from torch.optim.swa_utils import AveragedModel

from lightning_qat.errors import UserError


def refuse_what_cannot_work(ours: pl.Callback, callbacks: list[pl.Callback]) -> None:
    """Check the other callbacks of a trainer.

    Raises:
        UserError: one of them cannot work beside ``ours``, or not in this order.
    """
    for index, other in enumerate(callbacks):
        name = type(other).__name__
        if isinstance(other, LearningRateFinder | BatchSizeFinder):
            raise UserError(
                f"{name} runs training steps of its own without callbacks, so no scale would ever "
                "be observed: find the value on the float network, without this callback."
            )
        averages = isinstance(other, WeightAveraging | StochasticWeightAveraging)
        if averages and index < callbacks.index(ours):
            raise UserError(
                f"{name} copies the network before it is fake-quantised: put "
                f"{type(ours).__name__} before it in the list of callbacks."
            )


def average_integers_as_integers(callback: WeightAveraging) -> None:
    """Keep Lightning's weight averaging away from zero points and switches.

    As an integer, an average of 64 and 64 that is 63.99 becomes 63, one less every step. A zero
    point follows from the averaged range instead, and switches are not averaged.
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
                observer: Any = getattr(mean, "activation_post_process", None)
                if hasattr(observer, "min_val") and observer.min_val.numel():
                    zero_point: Any = mean.zero_point
                    zero_point.copy_(observer.calculate_qparams()[1])

    averaged.update_parameters = update
