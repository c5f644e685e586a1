"""Batch-norm and observers freeze at absolute epochs, however the run got there."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_qat import QuantizationAwareTraining
from tests.quantization.networks import SmallModule, loader
from tests.quantization.test_callback import trainer_with


class Recorder(pl.Callback):
    """Scales and batch-norm statistics at the end of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        conv: Any = pl_module.get_submodule("net.stem.0")
        self.epochs.append(
            (
                conv.bn.running_mean.clone(),
                conv.activation_post_process.scale.clone(),
                conv.weight.detach().clone(),
            )
        )


def test_batch_norm_and_observers_freeze_at_their_epochs(tmp_path: Path) -> None:
    recorder = Recorder()
    callback = QuantizationAwareTraining(freeze_batch_norm_epoch=1, freeze_observer_epoch=2)
    trainer = trainer_with(callback, recorder, folder=tmp_path, max_epochs=4)
    trainer.fit(SmallModule(), loader(), loader(seed=1))
    means, scale, weights = zip(*recorder.epochs, strict=True)
    assert torch.equal(means[0], means[3])
    assert not torch.equal(scale[0], scale[1])
    assert torch.equal(scale[1], scale[3])
    assert not torch.equal(weights[2], weights[3])


def test_a_run_resumed_inside_an_epoch_freezes_where_the_whole_one_does(tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> SmallModule:
        torch.manual_seed(0)
        module = SmallModule()
        callback = QuantizationAwareTraining(freeze_batch_norm_epoch=1, freeze_observer_epoch=1)
        step_6 = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
        trainer = trainer_with(callback, step_6, folder=tmp_path)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return module

    whole = fit()
    resumed = fit(tmp_path / "step=6.ckpt")  # the second of four steps in epoch 1
    before, after = whole.net.state_dict(), resumed.net.state_dict()
    for name in before:
        if name.endswith(("scale", "running_mean")) and "weight_fake_quant" not in name:
            assert torch.equal(before[name], after[name]), name


def test_a_second_fit_trains_batch_norm_again_until_its_epoch(tmp_path: Path) -> None:
    callback, recorder = QuantizationAwareTraining(freeze_batch_norm_epoch=1), Recorder()
    module = SmallModule()
    for _ in range(2):
        trainer_with(callback, recorder, folder=tmp_path).fit(module, loader())
    means, _, _ = zip(*recorder.epochs, strict=True)
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])
