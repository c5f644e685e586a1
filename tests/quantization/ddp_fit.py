"""Fit in any number of processes. As a script: fit in two, and save the result of each."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.quantization.base import QuantizationCallback
from tests.quantization.comparisons import scales
from tests.quantization.networks import SmallModule, images, trainer_with


class Recorder(pl.Callback):
    """Record the losses of the training steps, and the last validated state."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validated: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = state_of(pl_module)


def state_of(module: Any) -> dict[str, Any]:
    """Return weights, statistics, and scales."""
    state = {name: x.clone() for name, x in module.state_dict().items()}
    return state | scales(module.net)


def fit(
    callback: QuantizationCallback,
    folder: Path,
    *,
    batch_size: int,
    every: int = 1,
    validation: bool = False,
    ckpt_path: Path | None = None,
    also: tuple[pl.Callback, ...] = (),
    **kwargs: Any,
) -> dict[str, Any]:
    """Train on every n-th image, in order; return all values that processes could differ in."""
    torch.manual_seed(0)
    module, recorder = SmallModule(), Recorder()
    trainer = trainer_with(callback, recorder, *also, folder=folder, **kwargs)
    x, labels = images()
    data = TensorDataset(x[::every], labels[::every])
    # Lightning's own sampler would shuffle.
    sampler: Sampler[Any] = DistributedSampler(
        data, trainer.world_size, trainer.global_rank, shuffle=False
    )
    loader = DataLoader(data, batch_size, sampler=sampler)
    trainer.fit(module, loader, loader if validation else None, ckpt_path=ckpt_path)
    return {
        "losses": recorder.losses,
        "validated": recorder.validated,
        "state": state_of(module),
        "logits": callback.int8_model(x),
    }


def continue_frozen(folder: Path, *, batch_size: int, **kwargs: Any) -> dict[str, Any]:
    """Continue from epoch 1 with frozen batch-norm and observers."""
    callback = QuantizationAwareTraining(freeze_batch_norm_epoch=1, freeze_observer_epoch=1)
    ckpt_path = folder / "epoch_0.ckpt"
    return fit(callback, folder, batch_size=batch_size, ckpt_path=ckpt_path, max_epochs=3, **kwargs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    results = {
        "frozen": continue_frozen(folder, batch_size=8, **two),
        "qat": fit(QuantizationAwareTraining(), folder, batch_size=8, **two),
        "lsq": fit(QuantizationAwareTraining("w4a4_lsq"), folder, batch_size=8, **two),
        "ptq": fit(
            PostTrainingQuantization(), folder, batch_size=8, max_epochs=1, validation=True, **two
        ),
    }
    torch.save(results, folder / f"rank_{torch.distributed.get_rank()}.pt")
