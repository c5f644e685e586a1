"""QuantizationAwareTraining in a user's LightningModule."""

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.quantization.attach import detach, quantization_of
from lightning_qat.quantization.prepare import copy_network
from tests.quantization.comparisons import (
    apart,
    in_onnx_runtime,
    int8_apart,
    integer_layers,
    same,
    scales,
)
from tests.quantization.networks import SmallModule, SmallNet, images, loader, trainer_with


def test_the_network_stays_the_users_object(fitted: Any) -> None:
    module, _ = fitted
    untouched = SmallNet()
    assert type(module.net) is SmallNet
    assert list(module.net.state_dict()) == list(untouched.state_dict())
    assert [n for n, _ in module.named_parameters() if n.startswith("net")] == [
        f"net.{n}" for n, _ in untouched.named_parameters()
    ]
    assert [n for n, _ in module.net.named_modules()] == [n for n, _ in untouched.named_modules()]


def test_every_layer_and_sum_is_rounded(fitted: Any) -> None:
    module, callback = fitted
    quantization: Any = quantization_of(module.net)
    assert {call.layer for call in quantization.plan.calls.values()} - {""} == {
        "stem.0", "block.conv1", "block.conv2", "block.add", "fc"
    }  # fmt: skip
    assert callback.in_float == {}
    x, _ = images()
    with torch.no_grad():
        rounded = module.eval().net(x)
        float_ = detach(copy_network(module.net))(x)
    assert 1e-4 < apart(float_, rounded) < 0.1


def test_int8_is_what_was_trained_bit_for_bit_also_in_onnx_runtime(fitted: Any) -> None:
    module, callback = fitted
    assert sorted(integer_layers(callback.int8_model)) == [
        "block.conv1", "block.conv2", "fc", "stem.0"
    ]  # fmt: skip
    x, _ = images(count=256, seed=5)
    for images_ in (x, x * 1.5):  # the second leave the observed ranges
        assert int8_apart(callback, images_) < 1e-6
        with torch.no_grad():
            expected = module.eval().net(images_)
        (found,) = in_onnx_runtime(module.net, images_)
        assert torch.equal(found, expected)


def test_the_int8_model_holds_the_trained_integers(fitted: Any) -> None:
    module, callback = fitted
    fake_quant: Any = quantization_of(module.net)
    weight = callback.int8_model.get_submodule("fc").weight()
    scale = fake_quant.weight("fc.weight").qparams()[0]
    assert torch.equal(weight.q_per_channel_scales().float(), scale)
    expected = (module.net.fc.weight / scale[:, None]).round().clamp(-63, 63).to(torch.int8)
    assert torch.equal(weight.int_repr(), expected)


def test_only_training_steps_move_scales(fitted: Any, tmp_path: Path) -> None:
    module, callback = copy.deepcopy(fitted[0]), QuantizationAwareTraining()
    trainer = trainer_with(callback, folder=tmp_path)
    before = scales(module.net)
    wild = loader(seed=3, scale=100.0)
    trainer.validate(module, wild, verbose=False)
    trainer.test(module, wild, verbose=False)
    module.net.train()(images()[0] * 100)
    assert same(before, scales(module.net))


def test_validation_inside_fit_moves_no_scale(no_int8: Any, tmp_path: Path) -> None:
    found = []
    for val_scale in (1.0, 100.0):
        torch.manual_seed(0)
        module = SmallModule()
        trainer = trainer_with(QuantizationAwareTraining(), folder=tmp_path, val_check_interval=2)
        trainer.fit(module, loader(), loader(seed=1, scale=val_scale))
        found.append(scales(module.net))
    assert same(*found)


class Worsens(SmallModule):
    """A module whose first epoch is the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def test_the_best_weights_are_converted_where_something_is_monitored(tmp_path: Path) -> None:
    module, callback = Worsens(), QuantizationAwareTraining()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = trainer_with(callback, best, folder=tmp_path, max_epochs=3)
    trainer.fit(module, loader(), loader(seed=1))
    last = {name: x.clone() for name, x in module.net.state_dict().items()}
    fake_quant = callback.networks["fake_quant"]
    assert not torch.equal(last["fc.weight"], fake_quant.state_dict()["fc.weight"])
    trainer.test(module, loader(seed=1), ckpt_path="best", verbose=False)
    assert same(dict(module.net.state_dict()), dict(fake_quant.state_dict()))
    assert same(scales(module.net), scales(fake_quant))
    assert int8_apart(callback, images()[0]) < 1e-6


def test_fit_again_goes_on_with_the_same_network(fitted: Any, no_int8: Any, tmp_path: Path) -> None:
    module = copy.deepcopy(fitted[0])
    net, before = module.net, module.net.fc.weight.detach().clone()
    ranges = scales(net)
    trainer = trainer_with(QuantizationAwareTraining(), folder=tmp_path, limit_train_batches=0)
    trainer.fit(module, loader())
    assert module.net is net
    assert same(scales(net), ranges), "a second preparation has changed ranges"
    trainer_with(QuantizationAwareTraining(), folder=tmp_path).fit(module, loader())
    assert not torch.equal(before, net.fc.weight)
    assert not torch.equal(fitted[0].net.fc.weight, net.fc.weight)


def test_a_new_head_is_quantized_too(fitted: Any, tmp_path: Path) -> None:
    module, callback = copy.deepcopy(fitted[0]), QuantizationAwareTraining()
    module.net.fc = nn.Linear(8, 6)
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    assert "fc" in integer_layers(callback.int8_model)
    assert int8_apart(callback, images()[0]) < 1e-6


def test_a_dotted_target_quantizes_a_part(tmp_path: Path) -> None:
    module, callback = SmallModule(), QuantizationAwareTraining(target="net.block")
    trainer_with(callback, folder=tmp_path).fit(module, loader())
    assert sorted(integer_layers(callback.int8_model)) == ["conv1", "conv2"]
    assert int8_apart(callback, torch.rand(2, 8, 8, 8)) < 1e-6


def test_calibration_trains_nothing(tmp_path: Path) -> None:
    module, callback = SmallModule(), PostTrainingQuantization("histogram_ptq")
    before = {name: x.clone() for name, x in module.state_dict().items()}
    modes = [x.training for x in module.net.modules()]
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    assert same(before, dict(module.state_dict()))
    assert module.automatic_optimization
    assert [x.training for x in module.net.modules()] == modes
    assert int8_apart(callback, images()[0]) < 1e-6


def test_copies_and_pickles_compute_the_same_and_go_their_own_way(
    fitted: Any, tmp_path: Path
) -> None:
    module, callback = fitted
    x, _ = images()
    twin, net = copy.deepcopy(module).eval(), pickle.loads(pickle.dumps(module.net)).eval()
    torch.save(module.net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False).eval()
    with torch.no_grad():
        expected = module.eval().net(x)
        for other in (twin.net, net, loaded):
            assert torch.equal(other(x), expected)
        before = scales(module.net)
        for other in (twin.net, net):
            quantization_of(other).observe(True)  # type: ignore[union-attr]
            other.train()(x * 100)
            assert not same(scales(other), before)
        assert same(scales(module.net), before)
    int8 = pickle.loads(pickle.dumps(callback.int8_model))
    for model in (int8, copy.deepcopy(callback.int8_model)):
        assert torch.equal(model(x), callback.int8_model(x))
