"""A multirun that searches, as Optuna's sweeper does: each job is to give a number to maximise.

It is the INT8 model's accuracy on the validation images. Sweepers take None for an error, and end
without a report where all jobs give one; so a failed job gives the worst accuracy there is, which
also leads the search away from it. The report calls it failed, whatever the search was told.
"""

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_qat.errors import UserError

WORST = 0.0


def is_one(hydra: HydraConf) -> bool:
    """Whether a job belongs to a search: Hydra's own sweeper just takes all values in turn."""
    return hydra.mode == RunMode.MULTIRUN and not hydra.sweeper._target_.endswith(".BasicSweeper")


def check(cfg: DictConfig) -> None:
    """Refuse a job that will have no such number, before it trains.

    Raises:
        UserError: it validates nothing, or makes no INT8 model.
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
