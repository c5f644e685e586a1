"""The callback together with other features of Lightning."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.demos.boring_classes import BoringModel, DemoModel, RandomDataset
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining, UserError
from lightning_qat.quantization import QConfig
from tests.quantization.comparisons import int8_apart, integer_layers, same, scales
from tests.quantization.networks import (
    BuildsLate,
    SmallModule,
    SmallNet,
    images,
    loader,
    trainer_with,
)


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, []),
        ({"precision": "bf16-mixed"}, []),
        ({"fast_dev_run": True}, []),
        ({"overfit_batches": 2, "reload_dataloaders_every_n_epochs": 1}, []),
        ({"limit_val_batches": 0, "max_steps": 3}, []),
        ({"detect_anomaly": True, "inference_mode": False}, []),
        ({}, [GradientAccumulationScheduler({0: 2, 1: 1})]),
        ({"max_epochs": 50}, [EarlyStopping("val_loss", min_delta=9.0, patience=0)]),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, dict) else "-".join(type(x).__name__ for x in value)
    ),
)
def test_trainer_settings_work(settings: dict[str, Any], extra: Any, tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    before = module.net.fc.weight.detach().clone()
    trainer = trainer_with(callback, *extra, folder=tmp_path, **settings)
    trainer.fit(module, loader(), loader(seed=1))
    assert trainer.current_epoch < 50
    assert not torch.equal(before, module.net.fc.weight)
    assert all(x.dtype == torch.float32 for x in scales(module.net).values())
    assert int8_apart(callback, images(count=256, seed=5)[0]) < 1e-5


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
def test_averaged_weights_and_scales_are_converted(averaging: Any, tmp_path: Path) -> None:
    module, average = SmallModule(), averaging()
    callback = QuantizationAwareTraining("power_of_two")
    trainer_with(callback, average, folder=tmp_path, max_epochs=24).fit(
        module, loader(), loader(seed=1)
    )
    averaged, converted = average._average_model.module, callback.networks["fake_quant"]
    assert same(dict(averaged.net.state_dict()), dict(converted.state_dict()))
    assert same(averaged.quantization_of_net.scales(), scales(converted))
    assert same(scales(module.net), scales(converted))
    x, labels = images(count=256, seed=5)
    assert int8_apart(callback, x) < 1e-5
    assert (callback.int8_model(x).argmax(1) == labels).double().mean() > 0.8


def test_stochastic_weight_averaging_ends_with_averaged_weights(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=0.5)
    trainer_with(callback, swa, folder=tmp_path, max_epochs=12).fit(module, loader())
    averaged: Any = swa._average_model
    converted: Any = callback.networks["fake_quant"]
    # Lightning's pass for batch-norm ends with an optimizer step, also for a float network.
    assert torch.allclose(averaged.net.fc.weight, converted.fc.weight, rtol=0, atol=0.05)
    x, labels = images(count=256, seed=5)
    assert int8_apart(callback, x) < 1e-5
    assert (callback.int8_model(x).argmax(1) == labels).double().mean() > 0.8


@pytest.mark.parametrize("first", [True, False])
def test_pruned_weights_are_zeros_in_int8(first: bool, tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    callbacks = [callback, ModelPruning("l1_unstructured", amount=0.5)]
    order = callbacks if first else callbacks[::-1]
    trainer_with(*order, folder=tmp_path).fit(module, loader())
    for name in integer_layers(callback.int8_model):
        layer: Any = callback.int8_model.get_submodule(name)
        weight = layer.weight()
        if weight.dim() == 4:
            assert (weight.int_repr() == 0).float().mean() > 0.4, name
    assert int8_apart(callback, images()[0]) < 1e-5


def test_the_checkpoint_of_an_exception_holds_the_scales(no_int8: Any, tmp_path: Path) -> None:
    class Fails(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("planted")
            return super().training_step(batch, batch_idx)

    keep = OnExceptionCheckpoint(str(tmp_path), "broken")
    module = Fails()
    trainer = trainer_with(
        QuantizationAwareTraining(), keep, folder=tmp_path, enable_checkpointing=True
    )
    with pytest.raises(KeyError, match="planted"):
        trainer.fit(module, loader())
    again = QuantizationAwareTraining().load(SmallModule(), tmp_path / "broken.ckpt")
    assert same(scales(module.net), scales(again.net))  # type: ignore[arg-type]


class BuildsInSetup(SmallModule):
    """Build the network in `setup`, when the data are known."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = SmallNet()


@pytest.mark.parametrize("kind", [BuildsLate, BuildsInSetup])
def test_a_network_that_is_built_late_is_quantized(kind: type[SmallModule], tmp_path: Path) -> None:
    module, callback = kind(), QuantizationAwareTraining()
    average = [EMAWeightAveraging(decay=0.9)] if kind is BuildsLate else []
    trainer = trainer_with(callback, *average, folder=tmp_path)
    trainer.fit(module, loader())
    assert int8_apart(callback, images()[0]) < 1e-5
    (figures,) = trainer.test(module, loader(seed=1), verbose=False)
    assert figures["test_loss"] < 5


class OwnsItsLayers(pl.LightningModule):
    """A LightningModule with its own layers and its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_module_with_a_forward_of_its_own_is_quantized_as_a_whole(tmp_path: Path) -> None:
    module, callback = OwnsItsLayers(), QuantizationAwareTraining()
    trainer = trainer_with(callback, folder=tmp_path)
    trainer.fit(module, loader())
    assert integer_layers(callback.int8_model) == ["conv", "fc"]
    assert int8_apart(callback, images()[0]) < 1e-5
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = QuantizationAwareTraining()
    again.load(OwnsItsLayers(), tmp_path / "last.ckpt")
    assert torch.equal(again.int8_model(images()[0]), callback.int8_model(images()[0]))


class Gan(pl.LightningModule):
    """Two networks with manual optimization in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 3, 4, 4)
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(288, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        by_generator, by_discriminator = self.optimizers()  # type: ignore[misc,attr-defined]
        optimizer = by_discriminator if batch_idx % 2 == 0 else by_generator
        made = self.generator(torch.randn(len(x), 8))
        wanted = torch.full((len(x), 1), float(batch_idx % 2))
        loss = F.binary_cross_entropy_with_logits(self.discriminator(made), wanted)
        if batch_idx % 2 == 0:
            real = self.discriminator(x)
            loss = loss + F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        networks = (self.generator, self.discriminator)
        return [torch.optim.SGD(x.parameters(), lr=0.01) for x in networks]


def test_two_callbacks_quantize_both_networks_of_a_gan(tmp_path: Path) -> None:
    module = Gan()
    first = QuantizationAwareTraining("qnnpack", target="generator")
    # Generated and real images have different ranges.
    second = QuantizationAwareTraining(QConfig(observer="min_max"), target="discriminator")
    trainer = trainer_with(first, second, folder=tmp_path)
    trainer.fit(module, loader())
    assert int8_apart(second, images()[0]) < 1e-5
    assert first.int8_model(torch.randn(5, 8)).shape == (5, 3, 8, 8)
    assert (first.int8_model.engine, second.int8_model.engine) == ("qnnpack", "x86")
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    again = QuantizationAwareTraining(QConfig(observer="min_max"), target="discriminator")
    again.load(Gan(), tmp_path / "both.ckpt")
    assert torch.equal(again.int8_model(images()[0]), second.int8_model(images()[0]))


def test_a_step_may_do_without_the_network(tmp_path: Path) -> None:
    class TakesTurns(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    callback = QuantizationAwareTraining(example_inputs=images(2)[0])
    trainer_with(callback, folder=tmp_path).fit(TakesTurns(), loader())
    assert int8_apart(callback, images()[0]) < 1e-5


def test_calibrating_a_module_that_optimizes_by_hand_is_refused(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(target="discriminator")
    with pytest.raises(UserError, match="automatic_optimization"):
        trainer_with(callback, folder=tmp_path).fit(Gan(), loader())


def test_lightnings_own_demos_are_quantized(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(target="layer")
    trainer_with(callback, folder=tmp_path, limit_train_batches=4).fit(BoringModel())
    assert int8_apart(callback, torch.randn(64, 32)) < 1e-5
    callback = QuantizationAwareTraining(target="l1")
    data = DataLoader(RandomDataset(32, 64), batch_size=8)
    trainer_with(callback, folder=tmp_path, limit_train_batches=4).fit(DemoModel(), data)
    assert int8_apart(callback, torch.randn(64, 32)) < 1e-5


def test_a_compiled_module_trains_and_converts(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    compiled: Any = torch.compile(module, backend="aot_eager")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(compiled, loader())
    assert int8_apart(callback, images()[0]) < 1e-5


def test_two_runs_end_with_the_same_bits(no_int8: Any, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        module = SmallModule()
        trainer = trainer_with(QuantizationAwareTraining("w4a4_lsq"), folder=tmp_path)
        trainer.fit(module, loader(), loader(seed=1))
        found.append(dict(module.state_dict()) | scales(module.net))
    assert same(*found)
