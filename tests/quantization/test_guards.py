"""Impossible combinations are refused, with the reason and a solution."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining, UserError
from tests.quantization.comparisons import int8_apart, same, scales
from tests.quantization.networks import (
    BuildsLate,
    SmallModule,
    SmallNet,
    images,
    loader,
    trainer_with,
)


def refused(match: str, folder: Path, module: Any, *callbacks: Any, **settings: Any) -> None:
    callbacks = callbacks or (QuantizationAwareTraining(),)
    with pytest.raises(UserError, match=match):
        trainer_with(*callbacks, folder=folder, **settings).fit(module, loader())


def test_there_is_no_int8_model_before_fit() -> None:
    with pytest.raises(RuntimeError, match=r"when `trainer.fit` ends"):
        _ = QuantizationAwareTraining().int8_model


@pytest.mark.parametrize("module", [SmallModule, BuildsLate])
def test_a_missing_target_is_named_with_what_there_is(module: Any, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(target="network")
    refused(r"target='network'.*It has: net", tmp_path, module(), callback)


def test_a_target_with_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(target="net.stem.2")
    refused("calls no layer that could be quantized", tmp_path, SmallModule(), callback)


class Branching(SmallNet):
    """A network whose forward depends on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_network_that_torch_cannot_export_is_refused_with_a_way_out(tmp_path: Path) -> None:
    refused(r"cannot follow Branching.*`target`", tmp_path, SmallModule(Branching()))


class TakesTurns(SmallNet):
    """A network that calls other layers in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.steps = nn.Conv2d(8, 8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        x = self.stem(x)
        if self.training and self.steps % 2:
            x = self.other(x)
        return self.fc(self.block(x).mean((2, 3)))


def test_other_layers_from_step_to_step_are_refused(tmp_path: Path) -> None:
    match = r"training calls 'other/conv2d.0' in some steps only.*no single INT8 model"
    refused(match, tmp_path, SmallModule(TakesTurns()))


def test_layers_that_only_evaluation_calls_are_refused(no_int8: Any, tmp_path: Path) -> None:
    class CallsMore(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.other, self.calls = nn.Conv2d(8, 8, 1), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc((self.other(x) if self.calls else x).mean((2, 3)))

    module = SmallModule(CallsMore())
    trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    module.net.calls = True
    with pytest.raises(UserError, match=r"evaluation calls 'other/conv2d.0'"):
        module.net.eval()(images()[0])


def test_a_weight_that_is_computed_from_the_input_is_refused_or_kept_in_float(
    tmp_path: Path,
) -> None:
    class Dynamic(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc(F.conv2d(x, x.mean((2, 3), keepdim=True)[:1]).expand(-1, 8, -1, -1)
                           .mean((2, 3)))  # fmt: skip

    refused(r"the weight of 'conv2d' .*computed.*overrides=\{'conv2d': None\}", tmp_path,
            SmallModule(Dynamic()))  # fmt: skip
    callback = QuantizationAwareTraining(overrides={"conv2d": None})
    trainer_with(callback, folder=tmp_path).fit(SmallModule(Dynamic()), loader())
    assert int8_apart(callback, images()[0]) < 1e-5


def test_a_value_that_is_changed_in_place_under_another_name_is_refused(tmp_path: Path) -> None:
    class Hidden(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            total = x * 1
            total.add_(self.block(x))
            return self.fc(F.relu(total).mean((2, 3)))

    refused("Hidden changes a tensor in place", tmp_path, SmallModule(Hidden()))


def test_example_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for wrong in (torch.rand(2, 4, 8, 8), (torch.rand(2, 3, 8, 8), 1), {"image": 1}):
        callback = QuantizationAwareTraining(example_inputs=wrong)
        refused("cannot be run on its example inputs: .*`example_inputs=`", tmp_path,
                SmallModule(), callback)  # fmt: skip


def test_a_network_that_training_does_not_run_is_refused(tmp_path: Path) -> None:
    class NotYet(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.fc.weight.sum()

    refused("does not call the SmallNet .*give the callback `example_inputs=`", tmp_path, NotYet())
    shown = QuantizationAwareTraining(example_inputs=images(2)[0])
    refused("training has run without the observers", tmp_path, NotYet(), shown)
    frozen = QuantizationAwareTraining(freeze_observer_epoch=0)
    refused("freeze_observer_epoch has come before", tmp_path, SmallModule(), frozen)


def test_a_network_behind_another_name_is_quantized_all_the_same(tmp_path: Path) -> None:
    class Alias(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(self.net)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

    callback = QuantizationAwareTraining(target="net")
    trainer_with(callback, folder=tmp_path).fit(Alias(), loader())
    assert int8_apart(callback, images()[0]) < 1e-5


class Diverges(SmallModule):
    """A module with an infinity in the last batch of each epoch, in an image or in the loss."""

    where = ""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        if self.where == "image" and batch_idx == 3:
            x = x.clone()
            x[0, 0, 0, 0] = torch.inf
        loss = super().training_step((x, labels), batch_idx)
        return loss * torch.nan if self.where == "loss" and batch_idx == 3 else loss


@pytest.mark.parametrize("name", ["x86", "w4a4_lsq"])
@pytest.mark.parametrize("where", ["loss", "image"])
def test_what_has_become_nan_is_not_converted(where: str, name: str, tmp_path: Path) -> None:
    module = Diverges()
    module.where = where
    callback = QuantizationAwareTraining(name)
    refused("NaN or infinite, so there is nothing to convert", tmp_path, module, callback)


def test_without_a_training_step_there_is_no_int8_model(no_int8: Any, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(SmallModule(), loader())
    with pytest.warns(UserWarning, match="nothing to convert"):
        trainer_with(callback, folder=tmp_path, limit_train_batches=0).fit(SmallModule(), loader())
    with pytest.raises(RuntimeError, match="no INT8 model yet"):
        _ = callback.int8_model


def test_an_interrupted_fit_leaves_scales_alone(tmp_path: Path) -> None:
    class Fails(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("planted")
            return super().training_step(batch, batch_idx)

    module = Fails()
    for callback in (PostTrainingQuantization(), QuantizationAwareTraining()):
        with pytest.raises(KeyError, match="planted"):
            trainer_with(callback, folder=tmp_path).fit(module, loader())
        before = scales(module.net)
        module.net.train()(images()[0] * 100)
        assert same(before, scales(module.net))
        assert module.automatic_optimization


def test_a_best_checkpoint_of_an_earlier_fit_is_not_converted(tmp_path: Path) -> None:
    module, best = SmallModule(), ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer_with(best, folder=tmp_path, max_epochs=6).fit(module, loader(), loader(seed=1))
    callback = QuantizationAwareTraining()
    trainer = trainer_with(callback, best, folder=tmp_path, max_epochs=1)
    module.learning_rate = 3.0  # so that no epoch of it is the best
    with pytest.warns(UserWarning, match="the last weights are converted"):
        trainer.fit(module, loader(), loader(seed=1))
    converted: Any = callback.networks["fake_quant"]
    assert torch.equal(converted.fc.weight, module.net.fc.weight)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_without_float32_is_refused(precision: Any, tmp_path: Path) -> None:
    refused("Use '32-true' or 'bf16-mixed'", tmp_path, SmallModule(), precision=precision)


def test_an_int8_model_is_neither_trained_nor_moved(fitted: Any, tmp_path: Path) -> None:
    int8_model = fitted[1].int8_model
    refused("INT8 model, whose integers cannot be trained", tmp_path, SmallModule(int8_model))
    assert int8_model.cpu() is int8_model
    with pytest.raises(UserError, match="cannot go to meta"):
        nn.Sequential(int8_model).to("meta")


def test_a_compiled_network_is_refused_with_a_way_out(tmp_path: Path) -> None:
    module = SmallModule()
    module.net = torch.compile(module.net, backend="eager")
    refused("compile the LightningModule", tmp_path, module)


@pytest.mark.parametrize(
    "second",
    [
        PostTrainingQuantization(),
        QuantizationAwareTraining("qnnpack"),
        QuantizationAwareTraining(target="net.block"),
    ],
)
def test_two_callbacks_on_one_target_are_refused(second: Any, tmp_path: Path) -> None:
    match = f"two callbacks would quantize '{second.target or ''}'"
    refused(match, tmp_path, SmallModule(), QuantizationAwareTraining(), second)


@pytest.mark.parametrize(
    "average", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)], ids=["EMA", "SWA"]
)
def test_averaging_before_quantizing_is_refused(average: pl.Callback, tmp_path: Path) -> None:
    match = "put QuantizationAwareTraining before it"
    refused(match, tmp_path, SmallModule(), average, QuantizationAwareTraining())


class BringsItsData(SmallModule):
    """A module whose batch size can be found."""

    batch_size = 16

    def train_dataloader(self) -> Any:
        return loader()


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder, None])
def test_finders_are_refused_with_a_reason(finder: Any, tmp_path: Path) -> None:
    callbacks = [QuantizationAwareTraining(), *([finder()] if finder else [])]
    trainer = trainer_with(*callbacks, folder=tmp_path)
    run = trainer.fit if finder else Tuner(trainer).lr_find
    with pytest.raises(UserError, match="on the float network, without this callback"):
        run(BringsItsData())
