"""Give a search, such as Optuna's sweeper, the number to maximize.

The number is the accuracy of the INT8 model on the validation images. Sweepers take None for an
error, and stop without a report if all jobs return None. So a failed job returns the worst
accuracy, which also leads the search to other values. The report still marks the job as failed.
"""

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_qat.errors import UserError

WORST = 0.0


def is_one(hydra: HydraConf) -> bool:
    """Return True if the job is part of a search. BasicSweeper only takes all values in turn."""
    return hydra.mode == RunMode.MULTIRUN and not hydra.sweeper._target_.endswith(".BasicSweeper")


def check(cfg: DictConfig) -> None:
    """Refuse a job that cannot return this number, before it trains.

    Raises:
        UserError: the job has no validation images, or makes no INT8 model.
    """
    if not OmegaConf.select(cfg, "data.val_size"):
        raise UserError(
            "a search chooses by the accuracy on validation images, and data.val_size=0 keeps none "
            "(the test images must not choose): set data.val_size to some hundreds or more."
        )
    if "qconfig" not in cfg.callbacks.result:
        raise UserError(
            "a search chooses by the accuracy of an INT8 model, and this stage makes none: use "
            "stage=qat or stage=ptq."
        )
