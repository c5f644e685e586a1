"""Quantisation aware training as a Lightning callback."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.ao import quantization as tq

from lightning_qat.errors import checked_int
from lightning_qat.quantization.base import QuantizationCallback


class QuantizationAwareTraining(QuantizationCallback):
    """Trains ``target`` with fake quantisation and converts it to INT8 when ``fit`` ends.

    Example::

        callback = QuantizationAwareTraining(qconfig="x86", target="net")
        trainer = pl.Trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, datamodule=datamodule)
        callback.int8_model(images)

    The INT8 model is made of the best checkpoint's weights where a ModelCheckpoint monitors
    something, else of the last ones. The method is Jacob et al., "Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), with the freezes of
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018).

    Args:
        qconfig: a name (see ``lightning_qat.quantization.QCONFIGS``) or a ``QConfig``.
        target: dotted name of the submodule to quantise.
        overrides: another qconfig for some layers, by their name in ``target`` (which covers what
            is below it) or by their type; None as the value keeps them in float.
        only: the one layer, or part, that is quantised, as to see what it costs; None = all.
        fuse: lists of names of modules to fuse; None = all that can be fused, and the network's own
            ``fuse_model(is_qat=True)`` first, where it has one.
        freeze_batch_norm_epoch: from this epoch on batch-norm uses and keeps its running
            statistics, as the INT8 model will; None = never.
        freeze_observer_epoch: from this epoch on the scales stay; None = never.
            Both count from 0 at the start of training, also in a resumed run.
        allow_saturation: permit a qconfig whose sums this CPU's kernels cannot hold.
    """

    def __init__(
        self,
        qconfig: str | tq.QConfig = "x86",
        target: str = "net",
        *,
        overrides: Mapping[Any, str | tq.QConfig | None] | None = None,
        only: str | None = None,
        fuse: Sequence[Sequence[str]] | None = None,
        freeze_batch_norm_epoch: int | None = None,
        freeze_observer_epoch: int | None = None,
        allow_saturation: bool = False,
    ) -> None:
        super().__init__(
            qconfig,
            target,
            overrides=overrides,
            only=only,
            fuse=fuse,
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
        """Observe in training steps only, and freeze by the epoch: a run may resume inside one."""
        net, epoch = self._network(pl_module), trainer.current_epoch
        if self.freeze_observer_epoch is None or epoch < self.freeze_observer_epoch:
            net.apply(tq.enable_observer)
        if self.freeze_batch_norm_epoch is None:
            return
        if epoch < self.freeze_batch_norm_epoch:  # a second fit starts from the beginning
            for batch_norm in self._frozen:
                batch_norm.train()
            self._frozen.clear()
            return
        for module in net.modules():  # not those that the user has frozen: they are to stay it
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                self._frozen.add(module.eval())
