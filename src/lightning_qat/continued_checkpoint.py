"""The best and the last checkpoint of a run, also where it is continued in another folder."""

import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from lightning_qat.atomic import atomic_path
from lightning_qat.checkpoint import read_checkpoint


class ContinuedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that a resumed run continues in its own folder.

    Lightning forgets the best score where the folder is another one, as it is for every run of
    train.py: the best epoch before the break would lose against any epoch after it. And a run that
    was broken off behind its last epoch would leave no checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the checkpoint so far to this run's folder, and keep its score."""
        before = Path(state_dict["best_model_path"])  # the last one's, too
        if state_dict["dirpath"] != self.dirpath and self.dirpath and before.is_file():
            read_checkpoint(before, "delete it to continue without it.")
            here = Path(self.dirpath) / before.name
            _copy(before, here)
            state_dict = state_dict | {
                "dirpath": self.dirpath,
                "best_model_path": str(here),
                "kth_best_model_path": str(here),
                "best_k_models": {str(here): state_dict["best_model_score"]},
            }
        super().load_state_dict(state_dict)


@rank_zero_only
def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(to) as partial:
        shutil.copyfile(file, partial)
