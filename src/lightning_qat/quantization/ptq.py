"""Post-training quantization: calibration instead of training, with the same conversion."""

from typing import Any

import pytorch_lightning as pl

from lightning_qat.errors import UserError
from lightning_qat.quantization.base import QuantizationCallback


class PostTrainingQuantization(QuantizationCallback):
    """Calibrate ``target`` on the batches of one ``fit``, and convert it to INT8.

    ``training_step`` runs on ``limit_train_batches`` batches, but nothing is optimized: the network
    is in eval mode, and its observers watch. Use ``max_epochs=1``.

    See ``QuantizationCallback`` for the arguments.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare as for training. Also check that Lightning steps the optimizer of the module.

        Raises:
            UserError: the module steps its optimizer itself, or ``target`` cannot be quantized.
        """
        if stage == "fit" and not pl_module.automatic_optimization:
            raise UserError(
                f"{type(pl_module).__name__} sets automatic_optimization=False: its training_step "
                "would go on training during calibration. Calibrate a module that returns its loss."
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch to manual optimization without an optimizer step, so that no weight changes."""
        self._modes = {module: module.training for module in pl_module.modules()}
        pl_module.automatic_optimization = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the original state of the module."""
        super().on_train_end(trainer, pl_module)
        self._leave(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restore the original state of the module."""
        super().on_exception(trainer, pl_module, exception)
        if hasattr(self, "_modes"):  # calibration had started
            self._leave(pl_module)

    def _leave(self, pl_module: pl.LightningModule) -> None:
        pl_module.automatic_optimization = True
        for module, was_training in self._modes.items():
            module.training = was_training

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Observe the inputs of the INT8 network: the layers before are quantized."""
        self._network(pl_module).eval()
        self._quantization(pl_module).observe(True)
