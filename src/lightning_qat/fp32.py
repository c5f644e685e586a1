"""What a finished ``stage=fp32`` leaves for the stages after it."""

import copy
from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from lightning_qat.checkpoint import best_weights, save_weights


class LeaveFloatWeights(pl.Callback):
    """Keeps the best weights, or the last where nothing is monitored, when ``fit`` ends.

    Args:
        path: the checkpoint that ``stage=ptq`` and ``stage=qat`` start from.

    Attributes:
        networks: after ``fit``, ``net`` as ``"fp32"``, on the CPU, in eval mode.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.networks: dict[str, nn.Module] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, on one process only."""
        module = copy.deepcopy(pl_module).cpu().eval()
        if (weights := best_weights(trainer, "")) is not None:
            module.load_state_dict(weights)
        self.networks["fp32"] = module.get_submodule("net")
        if trainer.is_global_zero:
            save_weights(module, self.path)
