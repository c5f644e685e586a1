"""Store the arguments of a run in its checkpoints."""

import hashlib
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig

from lightning_qat.errors import UserError
from lightning_qat.overrides import as_typed
from lightning_qat.quantization.checkpoints import read_checkpoint
from lightning_qat.resume import arguments, difference

# A checkpoint fixes these arguments. Only the length of the training may change later.
_CHOICES = ("stage", "data", "model")
_BELOW = ("model.", "recipe.")
_OPEN = (".epochs", ".milestones", ".compile")


class MadeWith(pl.Callback):
    """Store the arguments of the command in each checkpoint, so that both are written at once.

    Args:
        weights: the file that the run starts from, if any. Its content may change later, so its
            hash is stored.
        seed: seed of the run.
    """

    def __init__(self, weights: str | None, seed: int) -> None:
        job = HydraConfig.get()
        self.overrides = as_typed(job.overrides.task)
        self.settled = {name: job.runtime.choices[name] for name in _CHOICES} | {"seed": str(seed)}
        for name, value in arguments(self.overrides).items():
            if name.startswith(_BELOW) and not name.endswith(_OPEN):
                self.settled[name] = value
        self.weights, self.digest = weights, None
        if weights is not None:
            with Path(weights).open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the entries that Lightning stores in the checkpoint."""
        return {"overrides": self.overrides, "settled": self.settled, "weights": self.digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the run continues with the same arguments and the same starting weights.

        Raises:
            UserError: the arguments are different, or another run has replaced the file of weights
                that this run started from.
        """
        if (then := state_dict.get("settled", self.settled)) != self.settled:
            raise UserError(
                f"the run to continue was another one: {difference(then, self.settled)}. Give the "
                "same arguments, or start another run, for example from the weights of this one."
            )
        if state_dict.get("weights") not in (None, self.digest):
            raise UserError(
                f"{self.weights} holds other weights than when this run began: the run would be "
                "compared with another FP32 network, or learn from it. Put the old file there, or "
                "start this run again in another folder."
            )


def made_with(checkpoint: Path) -> list[str]:
    """Return the arguments that made this checkpoint, or an empty list if it does not hold any.

    Raises:
        UserError: the file is missing or damaged.
    """
    callbacks = read_checkpoint(checkpoint, "or start again.").get("callbacks", {})
    return callbacks.get(MadeWith.__qualname__, {}).get("overrides", [])
