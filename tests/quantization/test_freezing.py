"""Batch-norm and observers freeze at absolute epochs, also in a resumed run."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor

from lightning_qat import QuantizationAwareTraining
from lightning_qat.quantization.attach import quantization_of
from tests.quantization.comparisons import same, scales
from tests.quantization.networks import SmallModule, loader, trainer_with

pytestmark = pytest.mark.usefixtures("no_int8")


class Recorder(pl.Callback):
    """Record a statistic of batch-norm, a scale and a weight at the end of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        net = pl_module.net
        quantization: Any = quantization_of(net)
        scale = quantization.activation("stem/0/conv2d.0:out").qparams()[0]
        self.epochs.append(
            (net.stem[1].running_mean.clone(), scale, net.stem[0].weight.detach().clone())
        )


def test_batch_norm_and_observers_freeze_at_their_epochs(tmp_path: Path) -> None:
    recorder = Recorder()
    callback = QuantizationAwareTraining(freeze_batch_norm_epoch=1, freeze_observer_epoch=2)
    trainer = trainer_with(callback, recorder, folder=tmp_path, max_epochs=4)
    trainer.fit(SmallModule(), loader(), loader(seed=1))
    means, found, weights = zip(*recorder.epochs, strict=True)
    assert torch.equal(means[0], means[3])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[3])
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
    assert same(scales(whole.net), scales(resumed.net))
    for one, other in zip(whole.net.buffers(), resumed.net.buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_second_fit_trains_batch_norm_again_until_its_epoch(tmp_path: Path) -> None:
    callback, recorder = QuantizationAwareTraining(freeze_batch_norm_epoch=1), Recorder()
    module = SmallModule()
    for _ in range(2):
        trainer_with(callback, recorder, folder=tmp_path).fit(module, loader())
    means, _, _ = zip(*recorder.epochs, strict=True)
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])


class ThawsTheStem(BaseFinetuning):
    """Train the stem from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.stem, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.stem, optimizer, train_bn=True)


@pytest.mark.parametrize("first", [True, False])
def test_what_a_user_freezes_stays_frozen_until_thawed(first: bool, tmp_path: Path) -> None:
    module, recorder = SmallModule(), Recorder()
    module.net.block.bn1.eval()
    before, mean = module.net.stem[0].weight.detach().clone(), module.net.block.bn1.running_mean
    callbacks = [QuantizationAwareTraining(freeze_batch_norm_epoch=2), ThawsTheStem()]
    order = callbacks if first else callbacks[::-1]
    trainer_with(*order, recorder, folder=tmp_path, max_epochs=3).fit(module, loader())
    means, _, weights = zip(*recorder.epochs, strict=True)
    assert torch.equal(weights[0], before)
    assert not torch.equal(weights[1], before)
    assert torch.equal(means[0], torch.zeros(8))
    assert not torch.equal(means[1], torch.zeros(8))
    assert torch.equal(means[1], means[2])
    assert torch.equal(mean, torch.zeros(8)), "batch-norm that was in evaluation mode"
