"""LightningModules that are not ours, each with its own way of building and using networks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel, DemoModel, RandomDataset
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.utils.data import DataLoader

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from tests.quantization.networks import BuildsLate, SmallModule, SmallNet, images, loader
from tests.quantization.test_callback import agreement, fake_quants, trainer_with


class BuildsInSetup(SmallModule):
    """Builds its network when it knows its data."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = SmallNet()


@pytest.mark.parametrize("kind", [BuildsLate, BuildsInSetup])
def test_a_network_that_is_built_late_is_quantised(kind: type[SmallModule], tmp_path: Path) -> None:
    module, callback = kind(), QuantizationAwareTraining()
    ema = EMAWeightAveraging(decay=0.9)
    callbacks = (callback, ema) if kind is BuildsLate else (callback,)
    trainer = trainer_with(*callbacks, folder=tmp_path)
    trainer.fit(module, loader())
    assert len(fake_quants(module.net)) == 11
    assert agreement(callback) > 0.98
    (figures,) = trainer.test(module, loader(seed=1), verbose=False)
    assert figures["test_loss"] < 5


def test_a_target_that_is_never_built_is_named(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(target="body")
    with pytest.raises(ValueError, match=r"target='body'.*It has: net"):
        trainer_with(callback, folder=tmp_path).fit(BuildsLate(), loader())


def test_lightnings_boring_model_is_quantised(tmp_path: Path) -> None:
    module, callback = BoringModel(), QuantizationAwareTraining(target="layer")
    trainer_with(callback, folder=tmp_path, limit_train_batches=4).fit(module)
    assert callback.int8_model(torch.randn(5, 32)).shape == (5, 2)


def test_lightnings_demo_model_is_quantised(tmp_path: Path) -> None:
    module, callback = DemoModel(), QuantizationAwareTraining(target="l1")
    trainer_with(callback, folder=tmp_path, limit_train_batches=8).fit(
        module, DataLoader(RandomDataset(32, 64), batch_size=8)
    )
    layer: Any = module.l1.get_submodule("0")
    step, x = layer.activation_post_process.scale, torch.randn(64, 32)
    with torch.no_grad():
        assert (callback.int8_model(x) - module.l1(x)).abs().max() < 1.5 * step


class Attention(nn.Module):
    """An encoder of torch's own between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, images_: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(images_.flatten(1, 2))).mean(1))


def test_attention_stays_in_float_between_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = SmallModule(Attention(), learning_rate=0.01), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert callback.in_float["encoder"] == "no exact integer kernel"
    x, _ = images()
    step = module.net.head.activation_post_process.scale
    with torch.no_grad():
        assert (callback.int8_model(x) - module.eval().net(x)).abs().max() < 1.5 * step


class Manual(SmallModule):
    """Optimises by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimisation_trains_and_converts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Manual(), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert agreement(callback) > 0.98


def test_calibrating_a_module_that_optimises_by_hand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="automatic_optimization"):
        trainer_with(PostTrainingQuantization(), folder=tmp_path).fit(Manual(), loader())


class TwoTowers(pl.LightningModule):
    """Two networks, called with keywords, that give a tuple and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Towers()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images_, labels = batch
        (logits, _), extra = self.net(image=images_, numbers=images_.mean((2, 3)))
        return F.cross_entropy(logits, labels) + 0.01 * extra["norm"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Towers(nn.Module):
    """Image and numbers, both by keyword; an optional scale that nobody passes."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
        self.number_tower = nn.Sequential(nn.Linear(3, 16), nn.LeakyReLU(0.2))
        self.head = nn.Linear(8 * 36 + 16, 4)

    def forward(
        self, numbers: Tensor, *, image: Tensor, scale: Tensor | None = None, double: bool = False
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        if scale is not None:
            image = image * scale
        left, right = self.image_tower(image), self.number_tower(numbers)
        if double:
            left = left * 2
        logits = self.head(torch.cat([left, right], dim=1))
        return (logits, right), {"norm": left.pow(2).sum(1)}


def test_keyword_arguments_and_nested_outputs_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = TwoTowers(), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    x, _ = images()
    with torch.no_grad():
        (logits, right), extra = callback.int8_model(image=x, numbers=x.mean((2, 3)))
        (expected, _), _ = module.eval().net(image=x, numbers=x.mean((2, 3)))
    head: Any = module.net.get_submodule("head")
    step = head.activation_post_process.scale
    assert (logits - expected).abs().max() < 1.5 * step
    assert right.shape == (64, 16)
    assert extra["norm"].shape == (64,)


def test_two_callbacks_quantise_two_towers(tmp_path: Path) -> None:
    module = TwoTowers()
    first = QuantizationAwareTraining(target="net.image_tower")
    second = QuantizationAwareTraining("qnnpack", target="net.number_tower")
    best = ModelCheckpoint(tmp_path, "all", save_last=True)
    trainer_with(first, second, best, folder=tmp_path).fit(module, loader())
    assert first.int8_model(images()[0]).shape == (64, 8 * 36)
    assert second.int8_model(torch.rand(2, 3)).shape == (2, 16)
    assert (first.int8_model.engine, second.int8_model.engine) == ("x86", "qnnpack")
    again = QuantizationAwareTraining("qnnpack", target="net.number_tower")
    also = QuantizationAwareTraining(target="net.image_tower")
    reloaded = again.load(TwoTowers(), best.last_model_path)
    also.load(reloaded, best.last_model_path)
    assert torch.equal(also.int8_model(images()[0]), first.int8_model(images()[0]))
    numbers = torch.rand(2, 3)
    assert torch.equal(again.int8_model(numbers), second.int8_model(numbers))


@pytest.mark.parametrize(
    "second",
    [
        PostTrainingQuantization(),
        QuantizationAwareTraining("qnnpack"),
        QuantizationAwareTraining(target="net.block"),
    ],
)
def test_two_callbacks_on_one_target_are_refused(second: Any, tmp_path: Path) -> None:
    trainer = trainer_with(QuantizationAwareTraining(), second, folder=tmp_path)
    with pytest.raises(ValueError, match=f"two callbacks would quantise '{second.target}'"):
        trainer.fit(SmallModule(), loader())


class Regression(pl.LightningModule):
    """A multilayer perceptron with batch-norm, for one number."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(3, 32), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(self.mlp(x.mean((2, 3))), x.mean((1, 2, 3))[:, None])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_regression_network_keeps_its_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Regression(), QuantizationAwareTraining(target="mlp")
    trainer_with(callback, folder=tmp_path, max_epochs=60).fit(module, loader())
    x = images(count=256, seed=5)[0]
    with torch.no_grad():
        error = callback.int8_model(x.mean((2, 3)))[:, 0] - x.mean((1, 2, 3))
        trained = (
            module.eval().mlp(x.mean((2, 3)))[:, 0] - callback.int8_model(x.mean((2, 3)))[:, 0]
        )
    assert error.std() < 0.05
    last: Any = module.mlp.get_submodule("6")
    step = last.activation_post_process.scale
    assert trained.abs().max() < 1.5 * step


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.block.conv2.weight = self.block.conv1.weight

    torch.manual_seed(0)
    module, callback = SmallModule(Tied()), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert module.net.block.conv1.weight is module.net.block.conv2.weight
    assert agreement(callback) > 0.98


class FusesItself(SmallNet):
    def fuse_model(self, is_qat: bool) -> None:
        chains = [["stem.0", "stem.1", "stem.2"], ["block.conv1", "block.bn1"]]
        tq.fuse_modules_qat(self, chains, inplace=True)


class NormalisesTwice(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.stem.extend([nn.BatchNorm2d(8), nn.ReLU()])


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (SmallNet, {}, "block.bn1"),
        (SmallNet, {"overrides": {"block": None}}, "block.bn1"),
        (NormalisesTwice, {}, "stem.3"),
        (FusesItself, {}, "block.bn1"),
    ],
    ids=["fused", "fused in float", "with ReLU alone", "fused by itself"],
)
def test_a_batch_norm_that_was_in_evaluation_mode_stays_in_it(
    kind: type[SmallNet], settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    module = SmallModule(kind())
    frozen = module.net.get_submodule(name).eval()
    mean = frozen.running_mean.clone()
    callback = QuantizationAwareTraining(freeze_batch_norm_epoch=1, **settings)
    trainer_with(callback, folder=tmp_path).fit(module, loader(), loader(seed=1))
    norms = [x for x in module.net.modules() if isinstance(x, nn.BatchNorm2d)]
    means: dict[bool, Any] = {x.weight is frozen.weight: x.running_mean for x in norms}
    assert torch.equal(means[True], mean)
    assert not torch.equal(means[False], torch.zeros(8))


def test_frozen_parameters_stay_frozen_but_for_the_rounding_of_biases(tmp_path: Path) -> None:
    module = SmallModule()
    frozen = dict(module.net.stem.requires_grad_(False).named_parameters())
    before = copy.deepcopy(frozen)
    trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    assert {id(x) for x in frozen.values()} <= {id(x) for x in module.net.parameters()}
    for name, value in frozen.items():
        atol = 1e-3 if name.endswith("bias") else 0
        torch.testing.assert_close(value, before[name], rtol=0, atol=atol)
