"""The callback beside what else people use of Lightning."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_qat import QuantizationAwareTraining
from tests.quantization.networks import SmallModule, images, loader
from tests.quantization.test_callback import agreement, fake_quants, trainer_with


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 1, "limit_val_batches": 0},
        {"max_steps": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"detect_anomaly": True},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_trainer_settings_work(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    before = module.net.fc.weight.detach().clone()
    trainer = trainer_with(callback, folder=tmp_path, **settings)
    trainer.fit(module, loader(), loader(seed=1))
    assert not torch.equal(before, module.net.fc.weight)
    assert agreement(callback) > 0.98


def test_early_stopping_ends_with_an_int8_model(tmp_path: Path) -> None:
    callback, stop = QuantizationAwareTraining(), EarlyStopping("val_loss", patience=0)
    module = SmallModule(learning_rate=3.0)
    trainer = trainer_with(callback, stop, folder=tmp_path, max_epochs=50)
    trainer.fit(module, loader(), loader(seed=1))
    assert trainer.current_epoch < 50
    assert callback.int8_model(images()[0]).shape == (64, 4)


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
        lambda: WeightAveraging(),
        lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    ],
    ids=["EMA", "EMA of weights only", "equal weights", "EMA of many at once"],
)
def test_averaged_weights_are_converted(averaging: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback, average = SmallModule(), QuantizationAwareTraining(), averaging()
    trainer_with(callback, average, folder=tmp_path, max_epochs=24).fit(
        module, loader(), loader(seed=1)
    )
    averaged = average._average_model.module
    assert torch.equal(averaged.net.fc.weight, module.net.fc.weight)
    converted: Any = callback.networks["fake_quant"]
    assert torch.equal(averaged.net.fc.weight, converted.fc.weight)
    for name, fake_quant in fake_quants(module.net).items():
        assert fake_quant.rounds, name
        if not name.endswith("weight_fake_quant"):
            observed: Any = fake_quant.activation_post_process
            scale, zero_point = observed.calculate_qparams()
            assert torch.allclose(fake_quant.scale, scale), name
            assert torch.equal(fake_quant.zero_point, zero_point), name
    assert agreement(callback) > 0.98
    x, labels = images(count=256, seed=5)
    assert (callback.int8_model(x).argmax(1) == labels).double().mean() > 0.8


def test_averaged_scales_are_powers_of_two_still(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining("power_of_two")
    average = EMAWeightAveraging(decay=0.9)
    trainer_with(callback, average, folder=tmp_path, max_epochs=12).fit(module, loader())
    for name, fake_quant in fake_quants(module.net).items():
        assert (torch.frexp(fake_quant.scale).mantissa == 0.5).all(), name


def test_stochastic_weight_averaging_ends_with_averaged_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=0.5)
    trainer_with(callback, swa, folder=tmp_path, max_epochs=12).fit(module, loader())
    averaged: Any = swa._average_model
    converted: Any = callback.networks["fake_quant"]
    # Lightning's pass for batch-norms ends with a step of the optimizer, of a float network too
    assert torch.allclose(averaged.net.fc.weight, converted.fc.weight, rtol=0, atol=0.05)
    assert agreement(callback) > 0.98
    x, labels = images(count=256, seed=5)
    assert (callback.int8_model(x).argmax(1) == labels).double().mean() > 0.8


@pytest.mark.parametrize(
    "average", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)], ids=["EMA", "SWA"]
)
def test_averaging_before_quantising_is_refused(average: pl.Callback, tmp_path: Path) -> None:
    trainer = trainer_with(average, QuantizationAwareTraining(), folder=tmp_path)
    with pytest.raises(ValueError, match="put QuantizationAwareTraining before it"):
        trainer.fit(SmallModule(), loader())


class BringsItsData(SmallModule):
    """Has a batch size that can be found."""

    batch_size = 16

    def train_dataloader(self) -> Any:
        return loader()


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_finders_are_refused_with_a_reason(finder: type[pl.Callback], tmp_path: Path) -> None:
    trainer = trainer_with(QuantizationAwareTraining(), finder(), folder=tmp_path)
    with pytest.raises(ValueError, match="on the float network, without this callback"):
        trainer.fit(BringsItsData())


def test_the_tuner_is_refused_too(tmp_path: Path) -> None:
    tuner = Tuner(trainer_with(QuantizationAwareTraining(), folder=tmp_path))
    with pytest.raises(ValueError, match="on the float network, without this callback"):
        tuner.lr_find(BringsItsData())


@pytest.mark.slow
def test_a_compiled_module_trains_and_converts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    compiled: Any = torch.compile(module, backend="aot_eager")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(compiled, loader())
    assert agreement(callback) > 0.98


def test_a_compiled_network_is_refused_with_a_way_out(tmp_path: Path) -> None:
    module = SmallModule()
    module.net = torch.compile(module.net, backend="eager")
    with pytest.raises(ValueError, match="compile the LightningModule"):
        trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())


def test_a_deep_copy_of_the_module_goes_its_own_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    twin, weight = copy.deepcopy(module), module.net.fc.weight.detach().clone()
    x, _ = images()
    assert torch.equal(twin.eval().net(x), module.eval().net(x))
    again = QuantizationAwareTraining()
    trainer_with(again, folder=tmp_path).fit(twin.train(), loader())
    assert torch.equal(module.net.fc.weight, weight)
    assert not torch.equal(twin.net.fc.weight, weight)
    assert agreement(again) > 0.98
