"""Write the weights that ``stage=fp32`` makes for the next stages."""

import copy
import os
from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from lightning_qat.checkpoint import refuse_to_replace, save_weights
from lightning_qat.errors import UserError, checked_path
from lightning_qat.quantization.checkpoints import best_file, load_best


class LeaveFloatWeights(pl.Callback):
    """Keep the best weights when ``fit`` ends, or the last weights if nothing is monitored.

    Args:
        path: the checkpoint that ``stage=ptq`` and ``stage=qat`` start from.

    Attributes:
        networks: after ``fit``, ``net`` under the name ``"fp32"``, on the CPU, in eval mode.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(checked_path("fp32_ckpt", path))
        self.networks: dict[str, nn.Module] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check before the training that the file can be written.

        Raises:
            UserError: the file cannot be written, or another file would be replaced.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable or self.path.is_dir():
            raise UserError(
                f"fp32_ckpt={self.path} is not a file that can be written: name another with "
                "fp32_ckpt=FILE, or another output_dir."
            )
        refuse_to_replace(self.path)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, on one process only."""
        module = copy.deepcopy(pl_module).cpu().eval()
        if (best := best_file(trainer)) is not None:
            module.load_state_dict(load_best(trainer, best[0])["state_dict"])
        self.networks["fp32"] = module.get_submodule("net")
        if trainer.is_global_zero:
            save_weights(module, trainer, self.path)
