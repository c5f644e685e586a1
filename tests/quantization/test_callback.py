"""QuantizationAwareTraining in somebody else's LightningModule."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from lightning_qat import QuantizationAwareTraining
from tests.quantization.networks import SmallModule, images, loader
from tests.quantization.random_layers import needs_every_integer


def trainer_with(*callbacks: pl.Callback, folder: Path, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_epochs": 2,
            "callbacks": list(callbacks),
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            **kwargs,
        }
    )


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[SmallModule, QuantizationAwareTraining]:
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, loader(), loader(seed=1))
    return module, callback


def agreement(callback: QuantizationAwareTraining) -> float:
    """Share of outputs of INT8 and fake-quant that are less than half a step apart."""
    x, _ = images(count=256, seed=5)
    fake_quant: Any = callback.networks["fake_quant"]
    step = fake_quant.fc.activation_post_process.scale
    with torch.no_grad():
        difference = (fake_quant(x) - callback.int8_model(x)).abs() / step
    return (difference < 0.5).double().mean().item()


def fake_quants(net: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in net.named_modules() if isinstance(m, tq.FakeQuantizeBase)}


def scales(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in net.state_dict().items()
        if name.endswith(("scale", "zero_point", "min_val", "max_val"))
    }


def test_every_weight_and_activation_is_fake_quantised(fitted: Any) -> None:
    module, _ = fitted
    # 4 weights and their outputs, the sum, the input, the input of the linear layer
    assert len(fake_quants(module.net)) == 4 + 4 + 1 + 2
    module.eval()
    x, _ = images()
    quantised = module.net(x)
    module.net.apply(tq.disable_fake_quant)
    assert not torch.equal(module.net(x), quantised)


def test_the_int8_model_runs_integer_kernels(fitted: Any) -> None:
    _, callback = fitted
    types = [type(m) for m in callback.int8_model.modules()]
    assert types.count(nniq.ConvReLU2d) == 2
    assert types.count(nnq.Conv2d) == 1
    assert types.count(nnq.Linear) == 1
    assert types.count(nnq.QFunctional) == 1
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.Linear} & set(types)
    assert torch.jit.script(callback.int8_model)(images()[0]).shape == (64, 4)


def test_the_int8_model_carries_the_trained_scales(fitted: Any) -> None:
    module, callback = fitted
    trained = dict(module.net.named_modules())
    checked = 0
    for name, layer in callback.int8_model.named_modules():
        if isinstance(layer, nnq.Conv2d | nnq.Linear):
            fake_quant = trained[name].weight_fake_quant
            assert torch.equal(layer.weight().q_per_channel_scales().float(), fake_quant.scale)
            assert layer.scale == trained[name].activation_post_process.scale.item()
            assert layer.zero_point == trained[name].activation_post_process.zero_point.item()
            checked += 1
    assert checked == 4


def test_int8_agrees_with_fake_quant_to_one_step(fitted: Any) -> None:
    module, callback = fitted
    x, _ = images(count=512, seed=5)
    step = module.net.fc.activation_post_process.scale
    with torch.no_grad():
        difference = (module.net.eval()(x) - callback.int8_model(x)).abs() / step
    assert difference.max() < 1.5
    assert (difference < 0.5).float().mean() > 0.99


@needs_every_integer
def test_values_beyond_the_observed_range_are_clipped_where_the_kernels_clip(fitted: Any) -> None:
    module, callback = fitted
    x = images()[0] * 1.7
    step = module.net.fc.activation_post_process.scale
    with torch.no_grad():
        inputs = module.net.eval().quant_x(x)
        assert inputs.max() > 128 * module.net.quant_x.activation_post_process.scale
        assert (module.net(x) - callback.int8_model(x)).abs().max() < 1.5 * step


def test_only_training_steps_move_observers(tmp_path: Path, fitted: Any) -> None:
    module, callback = fitted
    trainer = trainer_with(callback, folder=tmp_path)
    before = scales(module.net)
    wild = loader(seed=3, scale=100.0)
    trainer.validate(module, wild, verbose=False)
    trainer.test(module, wild, verbose=False)
    module.net.train()(images()[0] * 100)
    after = scales(module.net)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_validation_inside_fit_moves_no_observer(tmp_path: Path) -> None:
    def scales_after_fit(val_scale: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = SmallModule()
        trainer = trainer_with(QuantizationAwareTraining(), folder=tmp_path, val_check_interval=2)
        trainer.fit(module, loader(), loader(seed=1, scale=val_scale))
        return scales(module.net)

    ordinary, wild = scales_after_fit(1.0), scales_after_fit(100.0)
    assert all(torch.equal(ordinary[name], wild[name]) for name in ordinary)


def test_a_network_prepared_with_another_qconfig_is_refused(tmp_path: Path, fitted: Any) -> None:
    module, _ = fitted
    with pytest.raises(ValueError, match=r"already.*x86.*qnnpack"):
        trainer_with(QuantizationAwareTraining("qnnpack"), folder=tmp_path).fit(module, loader())


def test_hyper_parameters_of_any_kind_do_not_cost_the_training(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining()
    module.save_hyperparameters({"config": OmegaConf.create({"width": 8})})
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer_with(callback, best, folder=tmp_path).fit(module, loader(), loader(seed=1))
    assert callback.int8_model(images()[0]).shape == (64, 4)


class Worsens(SmallModule):
    """Its first epoch is its best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def test_the_best_weights_are_converted_where_something_is_monitored(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    module = Worsens()
    trainer = trainer_with(callback, best, folder=tmp_path, max_epochs=3)
    trainer.fit(module, loader(), loader(seed=1))
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert not torch.equal(state["net.fc.weight"], module.net.fc.weight), "the last is the best"
    int8: Any = callback.int8_model
    converted = int8.fc.weight().dequantize()
    fake_quant: Any = callback.networks["fake_quant"].get_submodule("fc")
    assert torch.equal(state["net.fc.weight"], fake_quant.weight)
    assert torch.equal(converted, fake_quant.weight_fake_quant(fake_quant.weight))


def test_the_module_stays_usable_and_tests_its_best_checkpoint(tmp_path: Path) -> None:
    callback, best = QuantizationAwareTraining(), ModelCheckpoint(tmp_path, monitor="val_loss")
    module = SmallModule()
    trainer = trainer_with(callback, best, folder=tmp_path)
    trainer.fit(module, loader(), loader(seed=1))
    assert fake_quants(module.net)
    (figures,) = trainer.test(module, loader(seed=1), ckpt_path="best", verbose=False)
    assert best.best_model_score is not None
    assert figures["test_loss"] == pytest.approx(best.best_model_score.item())


def test_fit_again_goes_on_training_the_same_network(tmp_path: Path, fitted: Any) -> None:
    module, callback = fitted
    net, before = module.net, module.net.fc.weight.detach().clone()
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert module.net is net
    assert not torch.equal(before, net.fc.weight)


def test_a_dotted_target_quantises_a_part(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining(target="net.block")
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert fake_quants(module.net.block)
    assert type(module.net.fc) is nn.Linear
    features = torch.rand(2, 8, 8, 8)
    assert callback.int8_model(features).shape == (2, 8, 8, 8)


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    module = SmallModule()
    before = {id(parameter) for parameter in module.parameters()}
    trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    assert {id(parameter) for parameter in module.parameters()} == before
