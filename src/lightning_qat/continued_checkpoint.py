"""Keep the best and the last checkpoint of a run that continues in another folder."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from lightning_qat.atomic import atomic_path
from lightning_qat.quantization.checkpoints import read_checkpoint

log = logging.getLogger(__name__)


class ContinuedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that a resumed run continues in its own folder.

    Lightning forgets the best score if the folder changes, and each run of train.py has its own
    folder. Then any later epoch would replace the best epoch before the break. A run that was
    interrupted after its last epoch would leave no checkpoint.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the checkpoint's folder. Lightning calls this before ``load_state_dict``."""
        self._resumed_from = Path(trainer.ckpt_path or "")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the earlier checkpoint to the folder of this run, and keep its score."""
        if self.dirpath not in (None, state_dict["dirpath"]) and state_dict["best_model_path"]:
            state_dict = state_dict | self._found(state_dict)
        super().load_state_dict(state_dict)

    def _found(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the path entries of ``state_dict``, with the present place of the file."""
        # the callback `last` stores its path here, too
        before = Path(state_dict["best_model_path"])
        here = Path(str(self.dirpath)) / before.name
        score = state_dict["best_model_score"]
        # The folder may have been moved since, and another run may use its old place.
        for file in (here, self._resumed_from.with_name(before.name), before):
            if file.is_file() and self._score_in(file) == score:
                if file != here:
                    _copy(file, here)
                return {
                    "dirpath": self.dirpath,
                    "best_model_path": str(here),
                    "kth_best_model_path": str(here),
                    "best_k_models": {str(here): score},
                }
        log.warning("%s is missing or was replaced: the earlier best epoch is ignored", before)
        return {"best_model_path": ""}

    def _score_in(self, file: Path) -> Any:
        checkpoint = read_checkpoint(file, "or delete the file to continue without it.")
        return checkpoint.get("callbacks", {}).get(self.state_key, {}).get("best_model_score")


@rank_zero_only
def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(to) as partial:
        shutil.copyfile(file, partial)
