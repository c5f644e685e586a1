"""Users' training code: references to parts of the network stay valid."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import QuantizationAwareTraining
from lightning_qat.quantization import QCONFIGS
from lightning_qat.quantization.attach import detach, quantization_of
from lightning_qat.quantization.prepare import copy_network, prepare
from tests.quantization.comparisons import apart, int8_apart
from tests.quantization.networks import SmallModule, SmallNet, images, loader, trainer_with
from tests.quantization.peoples_networks import Siamese


def fit(module: Any, folder: Path, **settings: Any) -> QuantizationAwareTraining:
    callback = QuantizationAwareTraining(**settings)
    trainer_with(callback, folder=folder).fit(module, loader())
    return callback


class LearnsFeatures(SmallModule):
    """A module whose loss uses the features that a hook on a block has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.net.block.register_forward_hook(lambda _, args, y: self.features.append(y))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.features.clear()
        loss = super().training_step(batch, batch_idx)
        (seen,) = self.features
        assert seen.requires_grad
        assert len(seen) == len(batch[0])
        return loss + 0.1 * seen.pow(2).mean()


def test_a_users_forward_hook_sees_each_step(tmp_path: Path) -> None:
    callback = fit(LearnsFeatures(), tmp_path)
    assert int8_apart(callback, images()[0]) < 1e-5


def test_a_hook_that_replaces_a_value_is_followed(tmp_path: Path) -> None:
    module = SmallModule()
    module.net.stem[0].register_forward_hook(lambda _, args, y: y * 0.5)
    module.net.block.register_forward_pre_hook(lambda _, args: (args[0] + 0.1,))
    assert int8_apart(fit(module, tmp_path), images()[0]) < 1e-5


class FadesIn(SmallNet):
    """A branch whose share grows during training."""

    alpha = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.alpha * F.relu(self.branch(x))).mean((2, 3)))


class Schedules(SmallModule):
    def on_train_epoch_start(self) -> None:
        self.net.alpha = min(1.0, self.current_epoch)


def test_an_attribute_that_training_changes_takes_effect(tmp_path: Path) -> None:
    module = Schedules(FadesIn())
    before = module.net.branch.weight.detach().clone()
    callback = fit(module, tmp_path)
    assert not torch.equal(module.net.branch.weight, before)
    x, _ = images()
    assert int8_apart(callback, x) < 1e-5
    with torch.no_grad():
        faded_in = module.net.eval()(x)
        module.net.alpha = 0.0
        assert apart(faded_in, module.net(x)) > 0.01


class HasFeatures(SmallNet):
    def features(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class CallsFeatures(SmallModule):
    """A module with half of its loss from another method than ``forward``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.01 * self.net.features(batch[0]).pow(2).mean()


def test_another_method_than_forward_is_quantized_too(tmp_path: Path) -> None:
    module = CallsFeatures(HasFeatures())
    callback = fit(module, tmp_path)
    x, _ = images()
    assert int8_apart(callback, x) < 1e-5
    net = module.net.eval()
    with torch.no_grad():
        float_: Any = detach(copy_network(net))
        assert 1e-4 < apart(float_.features(x), net.features(x)) < 0.1


class Momentum(SmallModule):
    """An encoder that follows the trained encoder, parameter by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), self.slow(batch[0] + 0.1))

    def on_train_batch_end(self, *args: Any) -> None:
        for fast, slow in zip(self.net.parameters(), self.slow.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


def test_a_momentum_encoder_follows_its_own_parameters(tmp_path: Path) -> None:
    module = Momentum()
    fit(module, tmp_path, target="net")
    for (name, fast), (other, slow) in zip(
        module.net.named_parameters(), module.slow.named_parameters(), strict=True
    ):
        assert name == other
        if fast.ndim > 1:
            assert apart(fast, slow) < 0.5, name
    assert quantization_of(module.slow) is None


class Compares(SmallModule):
    """A module that calls its network with three tensors, one of them by keyword."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        y = self.net(x, x.flip(-1), numbers=x.flatten(1)[:, :5])
        return F.cross_entropy(y, labels)


def test_the_int8_model_takes_what_the_network_takes(tmp_path: Path) -> None:
    callback = fit(Compares(Siamese()), tmp_path)
    x, _ = images(10)
    numbers = x.flatten(1)[:, :5]
    with torch.no_grad():
        expected = callback.networks["fake_quant"](x, x.flip(-1), numbers=numbers)
        found = callback.int8_model(x, x.flip(-1), numbers=numbers)
    assert apart(expected, found) < 1e-5


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_example_inputs_can_be_given_in_each_form(kind: str, no_int8: Any, tmp_path: Path) -> None:
    x, _ = images(4)
    given: Any = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[kind]
    module = SmallModule()
    fit(module, tmp_path, example_inputs=given)
    args, kwargs = quantization_of(module.net).example  # type: ignore[union-attr]
    assert [len(value) for value in [*args, *kwargs.values()]] == [2]
    assert list(kwargs) == (["x"] if kind == "dict" else [])


def test_a_network_may_change_its_input_in_place(tmp_path: Path) -> None:
    class Centers(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return super().forward(x)

    callback = fit(SmallModule(Centers()), tmp_path)
    x, _ = images()
    with torch.no_grad():
        expected = callback.networks["fake_quant"](x.clone())
        assert apart(expected, callback.int8_model(x.clone())) < 1e-5


def test_sync_batch_norm_is_folded_as_batch_norm_is() -> None:
    kinds = []
    for net in (SmallNet(), nn.SyncBatchNorm.convert_sync_batchnorm(SmallNet())):
        plan = prepare(net, (images(2)[0],), {}, lambda _: QCONFIGS["x86"]).plan
        kinds.append(sorted(call.kind for call in plan.calls.values()))
    assert kinds[0] == kinds[1]
    assert kinds[0].count("norm") == 3
