"""LSQ and LSQ+ in Lightning: scales that the optimizer trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import QuantizationAwareTraining
from lightning_qat.module import ImageClassifier
from lightning_qat.network import resnet18
from lightning_qat.quantization import learned_scales
from tests.quantization.comparisons import int8_apart, same, scales
from tests.quantization.networks import SmallModule, images, loader, trainer_with


def saved_scales(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["lightning_qat"]["net"]["scales"]


def test_scales_are_trained_saved_and_continued_to_the_bit(no_int8: Any, tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> SmallModule:
        torch.manual_seed(0)
        module = SmallModule()
        callback = QuantizationAwareTraining("w4a4_lsq", freeze_observer_epoch=2)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = trainer_with(callback, keep, folder=tmp_path, max_epochs=4)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return module

    module = fit()
    early, late = (saved_scales(tmp_path / f"epoch={epoch}.ckpt") for epoch in (0, 2))
    continued = fit(tmp_path / "epoch=0.ckpt")
    assert same(scales(module.net), scales(continued.net))
    assert same(dict(module.net.state_dict()), dict(continued.net.state_dict()))
    learned = [name for name, _ in module.named_parameters() if name.endswith(".scale")]
    assert len(learned) == 4  # two weights, and the inputs of the two layers
    for name in (x.removeprefix("quantization_of_net.") for x in learned):
        assert not torch.equal(early[name], late[name]), f"{name} learns nothing"
        assert not torch.equal(late[name], scales(module.net)[name]), "frozen with the observers"
    observed = [x for x in late if x.endswith(".low")]
    assert observed
    assert all(torch.equal(late[x], scales(module.net)[x]) for x in observed)


def classifier(**kwargs: Any) -> ImageClassifier:
    settings: dict[str, Any] = {
        "net": lambda num_classes: resnet18(num_classes, "imagenet"),
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
    [(Decays, "weight decay moves learned scales to 0"), (TrainsTheHead, "no optimizer has all")],
)
def test_optimizers_that_would_harm_scales_are_told_of(
    module: type[SmallModule], message: str, tmp_path: Path
) -> None:
    trainer = trainer_with(QuantizationAwareTraining("w4a4_lsq"), folder=tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match=message):
        trainer.fit(module(), loader())


class StepsTooFar(SmallModule):
    """Take too large steps, with two views of each image in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + super().training_step([batch[0].flip(3), batch[1]], batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for scale in learned_scales(self):
                scale.fill_(-1.0)


def test_no_scale_is_negative_in_what_a_last_step_leaves(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining("lsq_plus")
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer_with(callback, keep, folder=tmp_path).fit(StepsTooFar(), loader())
    saved = saved_scales(tmp_path / "last.ckpt")
    learned = [name for name in saved if name.endswith(".scale")]
    assert learned
    for name in learned:
        assert (saved[name] > 0).all(), name
    assert int8_apart(callback, images(seed=4)[0]) < 1e-5


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
