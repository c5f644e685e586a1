"""Quantization-aware training as a Lightning callback."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_qat.errors import checked_int
from lightning_qat.quantization.base import QuantizationCallback


class QuantizationAwareTraining(QuantizationCallback):
    """Train ``target`` with fake quantization, and convert it to INT8 when ``fit`` ends.

    Example::

        callback = QuantizationAwareTraining(qconfig="x86", target="net")
        trainer = pl.Trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, datamodule=datamodule)
        callback.int8_model(images)

    If a ModelCheckpoint monitors something, the INT8 model has the weights of the best checkpoint.
    Otherwise it has the last weights. The method is Jacob et al., "Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), with the freezes of
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018).

    Args:
        qconfig: see ``QuantizationCallback``, also for all other arguments that are not listed
            here.
        target: dotted name of the submodule to quantize; None = the network that ``forward`` runs.
        freeze_batch_norm_epoch: from this epoch on, batch-norm uses and keeps its running
            statistics, as in the INT8 model; None = never.
        freeze_observer_epoch: from this epoch on, the scales stay fixed; None = never. Both epochs
            count from 0 at the start of training, also in a resumed run.
    """

    def __init__(
        self,
        qconfig: Any = "x86",
        target: str | None = None,
        *,
        overrides: Mapping[Any, Any] | None = None,
        only: str | None = None,
        example_inputs: Any = None,
        freeze_batch_norm_epoch: int | None = None,
        freeze_observer_epoch: int | None = None,
        allow_saturation: bool = False,
    ) -> None:
        super().__init__(
            qconfig,
            target,
            overrides=overrides,
            only=only,
            example_inputs=example_inputs,
            allow_saturation=allow_saturation,
        )
        for name, epoch in (
            ("freeze_batch_norm_epoch", freeze_batch_norm_epoch),
            ("freeze_observer_epoch", freeze_observer_epoch),
        ):
            if epoch is not None:
                checked_int(name, epoch, lowest=0)
        self.freeze_batch_norm_epoch = freeze_batch_norm_epoch
        self.freeze_observer_epoch = freeze_observer_epoch
        self._frozen: set[nn.Module] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Observe, and freeze by the epoch. Lightning calls this before a training step."""
        net, epoch = self._network(pl_module), trainer.current_epoch
        if self.freeze_observer_epoch is None or epoch < self.freeze_observer_epoch:
            self._quantization(pl_module).observe(True)
        if self.freeze_batch_norm_epoch is None:
            return
        if epoch < self.freeze_batch_norm_epoch:  # a second fit starts from the beginning
            for batch_norm in self._frozen:
                batch_norm.train()
            self._frozen.clear()
            return
        for module in net.modules():  # layers that the user froze stay frozen
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                self._frozen.add(module.eval())
