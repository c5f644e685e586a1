"""LSQ and LSQ+: scales that training learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.ao import quantization as tq

from lightning_qat import QuantizationAwareTraining
from lightning_qat.module import ImageClassifier
from lightning_qat.network import resnet18
from lightning_qat.quantization import QCONFIGS, learned_scales
from lightning_qat.quantization.fake_quantize import SMALLEST_SCALE
from tests.quantization.networks import SmallModule, images, loader
from tests.quantization.test_callback import scales, trainer_with


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def by_autograd(
    x: Tensor, scale: Tensor, offset: Tensor, zero_point: Tensor, limits: tuple[int, int]
) -> Tensor:
    """The papers' formula, differentiated by torch."""
    integers = straight_through(((x - offset) / scale + zero_point).clamp(*limits))
    return (integers - zero_point) * scale + offset


def rounds_into(x: Tensor, scale: Tensor, zero_point: Any, limits: tuple[int, int]) -> Tensor:
    """Where torch's fake-quantisers have a gradient."""
    integers = (x / scale).round() + zero_point
    return (integers >= limits[0]) & (integers <= limits[1])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_weights_scale_is_the_papers(bits: int, per_channel: bool) -> None:
    name = {2: "w2a2_lsq", 4: "w4a4_lsq", 8: "lsq"}[bits]
    fake_quant: Any = QCONFIGS[name]().weight()
    if not per_channel:
        fake_quant = QCONFIGS[name]().weight.with_args(
            observer=tq.MinMaxObserver, qscheme=torch.per_tensor_symmetric
        )()
    torch.manual_seed(0)
    x, weights = torch.randn(6, 3, 3, 3, requires_grad=True), torch.randn(6, 3, 3, 3)
    fake_quant(x.detach())
    with torch.no_grad():
        fake_quant.scale.mul_(0.7)  # so that some are clipped
    (fake_quant(x) * weights).sum().backward()

    again, scale = x.detach().requires_grad_(), fake_quant.scale.detach().requires_grad_()
    shape = (6, 1, 1, 1) if per_channel else (1,)
    zero = torch.zeros(1)
    expected = by_autograd(again, scale.reshape(shape), zero, zero, fake_quant.limits)
    (expected * weights).sum().backward()
    torch.testing.assert_close(fake_quant(x), expected)
    torch.testing.assert_close(
        x.grad, weights * rounds_into(x, scale.reshape(shape), 0, fake_quant.limits)
    )
    values = x.numel() / scale.numel()
    paper = scale.grad / math.sqrt(values * fake_quant.limits[1])  # type: ignore[operator]
    torch.testing.assert_close(fake_quant.scale.grad, paper, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_an_activations_scale_and_offset_are_the_papers() -> None:
    fake_quant: Any = QCONFIGS["lsq_plus"]().activation.with_args(quant_max=15)()
    torch.manual_seed(0)
    x, weights = torch.randn(8, 40, requires_grad=True), torch.randn(8, 40)
    fake_quant(x.detach())
    with torch.no_grad():
        fake_quant.scale.mul_(0.6)
        fake_quant.offset.copy_(-5 * fake_quant.scale)  # a whole number of steps
    fake_quant.follow_parameters()
    (fake_quant(x) * weights).sum().backward()

    again = x.detach().requires_grad_()
    scale, offset = (p.detach().requires_grad_() for p in (fake_quant.scale, fake_quant.offset))
    expected = by_autograd(again, scale, offset, torch.zeros(1), (0, 15))
    (expected * weights).sum().backward()
    torch.testing.assert_close(fake_quant(x), expected)
    torch.testing.assert_close(x.grad, weights * rounds_into(x, scale, 5, (0, 15)))
    share = 1 / math.sqrt(40 * 15)
    for found, wanted in ((fake_quant.scale, scale), (fake_quant.offset, offset)):
        torch.testing.assert_close(found.grad, wanted.grad * share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shift", "zero_point", "highest"), [(0.0, 8, 7), (9.0, 0, 15)])
def test_a_scale_starts_from_the_mean_of_the_first_training_step(
    shift: float, zero_point: int, highest: int
) -> None:
    fake_quant: Any = QCONFIGS["w4a4_lsq"]().activation()
    x = torch.randn(16, 30) + shift
    with torch.no_grad():
        fake_quant(5 * x)  # what comes before training does not count
    fake_quant(x)
    fake_quant(3 * x)
    assert fake_quant.zero_point.item() == zero_point
    expected = 2 * x.abs().mean() / math.sqrt(highest)
    assert fake_quant.scale.item() == pytest.approx(expected.item())


def test_scales_are_trained_saved_and_continued_to_the_bit(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: Path | None = None) -> tuple[SmallModule, Any]:
        torch.manual_seed(0)
        module, callback = SmallModule(), QuantizationAwareTraining("w4a4_lsq")
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = trainer_with(callback, keep, folder=tmp_path, max_epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return module, callback

    module, callback = fit(3)
    after_one = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    continued, other = fit(3, tmp_path / "epoch=0.ckpt")
    for name, scale in scales(module).items():
        assert torch.equal(scale, scales(continued)[name]), name
    x, _ = images(seed=4)
    assert torch.equal(callback.int8_model(x), other.int8_model(x))
    learned = [name for name, _ in module.named_parameters() if name.endswith(".scale")]
    assert len(learned) == 4  # two weights, and what the two layers take in
    for name in learned:
        assert not torch.equal(after_one[name], module.state_dict()[name]), f"{name} learns nothing"


def test_freezing_observers_does_not_freeze_learned_scales(tmp_path: Path) -> None:
    module = SmallModule()
    callback = QuantizationAwareTraining("w4a4_lsq", freeze_observer_epoch=1)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer_with(callback, keep, folder=tmp_path, max_epochs=3).fit(module, loader())
    before = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    name = "net.block.conv1.weight_fake_quant.scale"
    assert not torch.equal(before[name], module.state_dict()[name])
    assert torch.equal(
        before["net.fc.activation_post_process.scale"],
        module.state_dict()["net.fc.activation_post_process.scale"],
    )


def classifier(**kwargs: Any) -> ImageClassifier:
    settings: dict[str, Any] = {
        "net": lambda classes: resnet18(classes, "imagenet"),
        "num_classes": 4,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "learning_rate": 0.01,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.1,
        "decay_all": True,
        "label_smoothing": 0.0,
    }
    return ImageClassifier(**settings | kwargs)


@pytest.mark.parametrize(("own", "expected"), [(None, 0.1), (0.002, 0.002)])
def test_our_module_gives_scales_a_rate_of_their_own_and_no_weight_decay(
    own: float | None, expected: float, tmp_path: Path
) -> None:
    module = classifier(scale_learning_rate=own)
    trainer = trainer_with(
        QuantizationAwareTraining("w4a4_lsq"), folder=tmp_path, max_epochs=1, limit_train_batches=1
    )
    trainer.fit(module, loader())
    (*others, group) = trainer.optimizers[0].param_groups
    assert {id(x) for x in group["params"]} == {id(x) for x in learned_scales(module)}
    assert len(group["params"]) > 30
    assert group["max_lr"] == expected
    assert group["weight_decay"] == 0
    trained = sum(len(each["params"]) for each in [*others, group])
    assert trained == len(list(module.parameters())), "each parameter in one group"


class Decays(SmallModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=0.1)


class TrainsTheHead(SmallModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.fc.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("module", "message"),
    [(Decays, "weight decay draws learned scales to 0"), (TrainsTheHead, "no optimizer has all")],
)
def test_optimizers_that_would_harm_scales_are_told_of(
    module: type[SmallModule], message: str, tmp_path: Path
) -> None:
    trainer = trainer_with(QuantizationAwareTraining("w4a4_lsq"), folder=tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match=message):
        trainer.fit(module(), loader())


class StepsTooFar(SmallModule):
    """As a large learning rate would."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for scale in learned_scales(self):
                scale.fill_(-1.0)


def test_no_scale_is_negative_in_what_a_last_step_leaves(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining("lsq_plus")
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer_with(callback, keep, folder=tmp_path).fit(StepsTooFar(), loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    learned = [name for name in saved if name.endswith(".scale")]
    assert learned
    for name in learned:
        assert (saved[name] > 0).all(), name
    x, _ = images(seed=4)
    expected = callback.networks["fake_quant"](x)
    one_step = 1.5 * SMALLEST_SCALE
    torch.testing.assert_close(callback.int8_model(x), expected, rtol=0, atol=one_step)


class SeesTwoViews(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + super().training_step([batch[0].flip(3), batch[1]], batch_idx)


def test_a_step_may_run_the_network_twice(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining("lsq_plus")
    trainer_with(callback, folder=tmp_path).fit(SeesTwoViews(), loader())
    assert callback.int8_model(images()[0]).isfinite().all()


def test_distillation_learns_from_the_float_networks_answers() -> None:
    torch.manual_seed(0)
    taught, plain = classifier(distill=True), classifier()
    plain.net.load_state_dict(taught.net.state_dict())
    batch = torch.rand(8, 3, 16, 16), torch.randint(4, (8,))
    losses = []
    for module in (taught, plain):
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        with torch.no_grad():
            module.net.fc.weight.add_(0.1)  # type: ignore[union-attr, operator]
        losses.append(module._loss(batch, "train", module.accuracy["fit"]))
    with torch.no_grad():
        teacher: Any = taught._teacher[0]
        said = teacher((batch[0] - 0.5) / 0.2).softmax(1)
        divergence = nn.functional.cross_entropy(plain(batch[0]), said)
    assert losses[0].item() == pytest.approx((losses[1] + divergence).item() / 2, rel=1e-3)
    assert set(taught.state_dict()) == set(plain.state_dict()), "the teacher is not saved"
    assert {id(x) for x in taught.parameters()}.isdisjoint(map(id, teacher.parameters()))
