"""What cannot work is refused, with the reason and the way out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.quantization.check import check_same_function
from tests.quantization.networks import SmallModule, SmallNet, images, loader
from tests.quantization.test_callback import agreement, scales, trainer_with


def test_there_is_no_int8_model_before_fit() -> None:
    with pytest.raises(RuntimeError, match=r"when `trainer.fit` ends"):
        _ = QuantizationAwareTraining().int8_model


def test_a_missing_target_is_named_with_what_there_is(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(target="network")
    with pytest.raises(ValueError, match=r"target='network'.*It has: net"):
        trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())


def test_a_target_with_nothing_to_quantise_is_refused(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(target="net.stem.2")
    with pytest.raises(ValueError, match="no layer with an integer kernel"):
        trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())


class Branching(SmallNet):
    """Its forward depends on the values in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_an_untraceable_network_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot trace Branching.*`target`"):
        trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(
            SmallModule(Branching()), loader()
        )


class NormalisesAnotherDimension(SmallNet):
    """Batch-norm over channels behind a linear layer over features: fusing cannot keep that."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.bn = nn.Linear(64, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.mix(self.stem(x).flatten(2))).mean(2))


def test_a_batch_norm_that_cannot_be_fused_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"normalises the second.*`fuse=\[\]`"):
        trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(
            SmallModule(NormalisesAnotherDimension()), loader()
        )
    module, callback = SmallModule(NormalisesAnotherDimension()), QuantizationAwareTraining(fuse=[])
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert agreement(callback) > 0.9


def test_a_scale_that_was_never_observed_is_refused(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(freeze_observer_epoch=0)
    with pytest.raises(ValueError, match="freeze_observer_epoch has come before"):
        trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())

    class Alias(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(self.net)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, labels = batch
            return nn.functional.cross_entropy(self.model(x), labels)

    with pytest.raises(ValueError, match="does not use 'net' itself"):
        trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(Alias(), loader())


def test_a_step_may_do_without_the_network(tmp_path: Path) -> None:
    class TakesTurns(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(TakesTurns(), loader())
    assert agreement(callback) > 0.9


def test_a_network_may_change_its_input_in_place(tmp_path: Path) -> None:
    class Centres(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return super().forward(x)

    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(SmallModule(Centres()), loader())
    x, _ = images()
    assert callback.int8_model(x.clone()).shape == (64, 4)


def test_without_a_training_step_there_is_no_int8_model(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())
    with pytest.warns(UserWarning, match="nothing to convert"):
        trainer_with(callback, folder=tmp_path, limit_train_batches=0).fit(SmallModule(), loader())
    with pytest.raises(RuntimeError, match="no INT8 model yet"):
        _ = callback.int8_model


def test_training_continues_after_a_calibration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SmallModule()
    trainer_with(PostTrainingQuantization(), folder=tmp_path, max_epochs=1).fit(module, loader())
    assert module.net.training
    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert module.net.block.conv1.bn.num_batches_tracked == 8
    assert callback.in_float


def test_an_interrupted_fit_leaves_observers_off(tmp_path: Path) -> None:
    class Fails(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("planted")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(KeyError, match="planted"):
        trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    before = scales(module.net)
    module.net.train()(images()[0] * 100)
    assert all(torch.equal(before[name], x) for name, x in scales(module.net).items())


def test_a_best_checkpoint_of_the_float_network_is_not_converted(tmp_path: Path) -> None:
    module, best = SmallModule(), ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer_with(best, folder=tmp_path, max_epochs=6).fit(module, loader(), loader(seed=1))
    callback = QuantizationAwareTraining()
    trainer = trainer_with(callback, best, folder=tmp_path, max_epochs=1)
    module.learning_rate = 3.0  # so that no epoch of it is the best
    with pytest.warns(UserWarning, match="the last weights are converted"):
        trainer.fit(module, loader(), loader(seed=1))
    assert callback.int8_model(images()[0]).shape == (64, 4)


def test_the_best_checkpoint_of_an_earlier_fit_is_not_converted(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    logits = []
    for learning_rate in (0.05, 3.0):  # the second has no epoch as good as the first
        torch.manual_seed(0)
        module = SmallModule(learning_rate=learning_rate)
        trainer_with(callback, best, folder=tmp_path).fit(module, loader(), loader(seed=1))
        logits.append(callback.int8_model(images()[0]))
    assert not torch.equal(*logits)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_without_float32_is_refused(precision: Any, tmp_path: Path) -> None:
    trainer = trainer_with(QuantizationAwareTraining(), folder=tmp_path, precision=precision)
    with pytest.raises(ValueError, match="Use '32-true' or 'bf16-mixed'"):
        trainer.fit(SmallModule(), loader())


def test_an_int8_model_is_not_trained(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    module.net = callback.int8_model
    with pytest.raises(ValueError, match="INT8 model, whose integers cannot be trained"):
        trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())


@pytest.mark.parametrize("copied", [False, True])
def test_an_int8_model_stays_on_the_cpu(copied: bool, tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    model = copy.deepcopy(callback.int8_model) if copied else callback.int8_model
    assert model.engine == "x86"
    assert model.cpu() is model
    with pytest.raises(ValueError, match="cannot go to meta"):
        nn.Sequential(model).to("meta")


class SeesTheEngine(nn.Module):
    """Notes for which of torch's engines it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[str] = []

    def __deepcopy__(self, memo: Any) -> "SeesTheEngine":
        self.engines.append(torch.backends.quantized.engine)
        return self


def test_a_copy_is_packed_for_the_same_engine(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining("qnnpack")
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    callback.int8_model.add_module("sees", sees := SeesTheEngine())
    copy.deepcopy(callback.int8_model)
    assert sees.engines == ["qnnpack"] != [torch.backends.quantized.engine]


def test_a_network_that_computes_something_else_is_an_error() -> None:
    net = SmallNet()
    other = copy.deepcopy(net)
    nn.init.zeros_(other.fc.weight)
    with pytest.raises(RuntimeError, match="does not compute what SmallNet computed"):
        check_same_function(net, other, (images()[0],), {})
