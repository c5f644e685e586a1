"""Run `train.py`'s training in parts, for `training.py`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models import ResNet

from lightning_qat.data.image_datamodule import ImageDataModule

CONF = Path(__file__).parents[1] / "conf"

Batch = tuple[Tensor, Tensor]


class Ours:
    """Runs of `train.py` with these overrides, all from the same random weights.

    Args:
        overrides: as on the command line.
        scratch: a folder for the weights and the output of the runs.

    Attributes:
        datamodule: set up once, for all runs.
        net: the network that all runs start with.
        model: the name of its configuration.
    """

    def __init__(self, overrides: list[str], scratch: Path) -> None:
        self.overrides, self.scratch = overrides, scratch
        cfg = self._compose()
        self.model = str(cfg.hydra.runtime.choices.model)
        self.datamodule: ImageDataModule = instantiate(cfg.data, _convert_="all")
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        pl.seed_everything(cfg.seed, verbose=False)
        self.net: ResNet = self._module(cfg).net
        self.weights = scratch / "weights.pt"
        torch.save(self.net.state_dict(), self.weights)

    def fit(self, stage: str, steps: int, watch: pl.Callback, ready: Batch | None = None) -> None:
        """Train for this number of steps, as in `train.py`, with one more callback.

        Args:
            stage: ``fp32`` or ``qat``.
            steps: at most an epoch.
            watch: the callback; it runs after the others.
            ready: float32 images N x 3 x H x W in [0, 1] and labels, on the device. They replace
                each batch. None = use the batches of the data set.
        """
        cfg = self._compose(
            f"stage={stage}",
            f"model.weights={self.weights}",
            f"fp32_ckpt={self.scratch}/fp32.ckpt",
            f"trainer.limit_train_batches={steps}",
            "++trainer.enable_model_summary=false",  # Lightning prints it before the first step
        )
        cfg.hydra.runtime.output_dir = tempfile.mkdtemp(dir=self.scratch)
        HydraConfig.instance().set_config(cfg)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        wanted = {name: callback for name, callback in cfg.callbacks.items() if callback}
        del wanted["best"]  # there is no validation
        callbacks = [*map(instantiate, wanted.values()), watch]
        loggers = [instantiate(logger) for logger in cfg.logger.values()]
        trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
        if ready is None:
            trainer.fit(self._module(cfg), datamodule=self.datamodule)
        else:
            batches: Any = [ready] * steps  # a list is a map-style data set
            trainer.fit(self._module(cfg), DataLoader(batches, batch_size=None))

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """Yield an epoch of augmented images, float32 N x 3 x H x W in [0, 1], and labels."""
        trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        trainer.training = True
        self.datamodule.trainer = trainer
        for fetched in self.datamodule.train_dataloader():
            batch = self.datamodule.transfer_batch_to_device(fetched, device, 0)
            yield self.datamodule.on_after_batch_transfer(batch, 0)

    def normalised(self, device: torch.device) -> Iterator[Batch]:
        """Yield the same batches, normalized as in the module."""
        mean, std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (self.datamodule.mean, self.datamodule.std)
        )
        for images, labels in self.batches(device):
            yield (images - mean) / std, labels

    def _compose(self, *overrides: str) -> Any:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", [*self.overrides, *overrides], return_hydra_config=True)

    def _module(self, cfg: Any) -> Any:
        return instantiate(
            cfg.model,
            num_classes=self.datamodule.num_classes,
            mean=self.datamodule.mean,
            std=self.datamodule.std,
            _convert_="all",
        )
