"""Which arguments made a checkpoint, kept in the checkpoint itself."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig

from lightning_qat.checkpoint import read_checkpoint
from lightning_qat.overrides import as_typed


class MadeWith(pl.Callback):
    """Puts the arguments of the command into each checkpoint, so that both are written at once."""

    def __init__(self) -> None:
        self.overrides = as_typed(HydraConfig.get().overrides.task)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into the checkpoint."""
        return {"overrides": self.overrides}


def made_with(checkpoint: Path) -> list[str]:
    """The arguments that made this checkpoint, empty where it does not say.

    Raises:
        UserError: it is missing or damaged.
    """
    callbacks = read_checkpoint(checkpoint, "or start again.").get("callbacks", {})
    return callbacks.get(MadeWith.__qualname__, {}).get("overrides", [])
