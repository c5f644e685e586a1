"""Checkpoints of a quantisation run: continued, and reloaded in another process."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import PostTrainingQuantization, QuantizationAwareTraining
from lightning_qat.errors import UserError
from tests.quantization.networks import BuildsLate, SmallModule, SmallNet, images, loader
from tests.quantization.test_callback import fake_quants, trainer_with


def same_batches() -> DataLoader[tuple[Tensor, ...]]:
    """Four times the same batch: a plain DataLoader does not go on inside an epoch."""
    x, labels = images(count=16)
    return DataLoader(TensorDataset(x.repeat(4, 1, 1, 1), labels.repeat(4)), batch_size=16)


@dataclass
class Run:
    """What a fit has ended with."""

    folder: Path
    module: SmallModule
    int8_logits: Tensor
    momenta: list[Tensor]


def fit(folder: Path, ckpt_path: Path | None = None, **settings: Any) -> Run:
    """Four epochs with a checkpoint at every step, or what is left of them."""
    torch.manual_seed(0)
    module = SmallModule()
    callback = QuantizationAwareTraining(
        **{"freeze_observer_epoch": 2, "freeze_batch_norm_epoch": 3, **settings}
    )
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer = trainer_with(callback, every, last, folder=folder, max_epochs=4)
    trainer.fit(module, same_batches(), loader(seed=1), ckpt_path=ckpt_path)
    x, _ = images()
    momenta = [x["momentum_buffer"] for x in trainer.optimizers[0].state.values()]
    return Run(folder, module, callback.int8_model(x), momenta)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8, 9, 11, 12, 15])
def test_a_run_continued_from_any_step_ends_bit_identical(
    step: int, whole: Run, tmp_path: Path
) -> None:
    resumed = fit(tmp_path, whole.folder / f"step={step}.ckpt")
    state = resumed.module.state_dict()
    for name, value in whole.module.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(resumed.int8_logits, whole.int8_logits)
    assert all(map(torch.equal, resumed.momenta, whole.momenta))


@pytest.mark.parametrize("settings", [{"qconfig": "qnnpack"}, {"overrides": {"fc": None}}])
def test_a_run_is_not_continued_with_other_rounding(
    settings: dict[str, Any], whole: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give the callback the same"):
        fit(tmp_path, whole.folder / "step=6.ckpt", **settings)


def test_a_checkpoint_reloads_into_a_fresh_module(whole: Run) -> None:
    torch.manual_seed(1)
    callback, fresh = QuantizationAwareTraining(), SmallModule()
    module = callback.load(fresh, whole.folder / "last.ckpt")
    assert module is fresh
    assert "fp32" not in callback.networks  # only `fit` has seen what it was trained from
    x, _ = images()
    assert torch.equal(callback.int8_model(x), whole.int8_logits)
    trainer = trainer_with(folder=whole.folder)
    (figures,) = trainer.test(module, loader(seed=1), verbose=False)
    (same,) = trainer.test(whole.module, loader(seed=1), verbose=False)
    assert figures == same
    before = {name: x.clone() for name, x in module.state_dict().items()}
    module.get_submodule("net").train()(x)
    scales = (name for name in before if name.endswith("scale"))
    assert all(torch.equal(before[name], module.state_dict()[name]) for name in scales)


def test_a_checkpoint_reloads_in_another_process(whole: Run, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from lightning_qat import QuantizationAwareTraining\n"
        "from tests.quantization.networks import SmallModule, images\n"
        "callback = QuantizationAwareTraining()\n"
        "callback.load(SmallModule(), sys.argv[1])\n"
        "torch.save(callback.int8_model(images()[0]), sys.argv[2])\n"
    )
    logits = tmp_path / "logits.pt"
    command = [sys.executable, "-c", code, str(whole.folder / "last.ckpt"), str(logits)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert torch.equal(torch.load(logits), whole.int8_logits)


def test_a_reloaded_module_is_trained_on(whole: Run, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining()
    module = callback.load(SmallModule(), whole.folder / "last.ckpt")
    fc: Any = module.get_submodule("net.fc")
    before = fc.weight.detach().clone()
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    assert not torch.equal(before, fc.weight)


def test_a_network_that_is_built_late_reloads(tmp_path: Path) -> None:
    callback, last = QuantizationAwareTraining(), ModelCheckpoint(tmp_path, "last")
    module = BuildsLate()
    trainer_with(callback, last, folder=tmp_path).fit(module, loader())
    again = QuantizationAwareTraining()
    again.load(BuildsLate(), tmp_path / "last.ckpt")
    x, _ = images()
    assert torch.equal(again.int8_model(x), callback.int8_model(x))


def test_an_averaged_checkpoint_reloads_with_the_averaged_weights(tmp_path: Path) -> None:
    callback, last = QuantizationAwareTraining(), ModelCheckpoint(tmp_path, "last")
    ema = EMAWeightAveraging(decay=0.9)
    trainer_with(callback, ema, last, folder=tmp_path).fit(SmallModule(), loader())
    again = QuantizationAwareTraining()
    again.load(SmallModule(), tmp_path / "last.ckpt")
    x, _ = images()
    assert torch.equal(again.int8_model(x), callback.int8_model(x))


def test_a_calibration_reloads_too(tmp_path: Path) -> None:
    callback, last = PostTrainingQuantization(), ModelCheckpoint(tmp_path, "last")
    trainer = trainer_with(callback, last, folder=tmp_path, max_epochs=1)
    trainer.fit(SmallModule(), loader())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = PostTrainingQuantization()
    again.load(SmallModule(), tmp_path / "saved.ckpt")
    x, _ = images()
    assert torch.equal(again.int8_model(x), callback.int8_model(x))


def test_wrong_checkpoints_are_refused_with_what_to_do(whole: Run, tmp_path: Path) -> None:
    def load(path: Path, module: SmallModule | None = None, **settings: Any) -> None:
        QuantizationAwareTraining(**settings).load(module or SmallModule(), path)

    last = whole.folder / "last.ckpt"
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"trained with .*x86.*prepared with .*qnnpack"):
        load(last, qconfig="qnnpack")
    with pytest.raises(ValueError, match="another network than this SmallModule"):
        load(last, target="net.block")

    class Wider(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 5)

    with pytest.raises(ValueError, match="another network than this SmallModule"):
        load(last, SmallModule(Wider()))
    float_ckpt = tmp_path / "float.ckpt"
    trainer = trainer_with(folder=tmp_path, max_epochs=1)
    trainer.fit(SmallModule(), loader())
    trainer.save_checkpoint(float_ckpt)
    with pytest.raises(ValueError, match="no fake-quantised 'net'"):
        load(float_ckpt)
    early, callback = tmp_path / "early.ckpt", QuantizationAwareTraining()
    trainer = trainer_with(callback, folder=tmp_path, limit_train_batches=0)
    trainer.fit(SmallModule(), loader())
    trainer.save_checkpoint(early)
    with pytest.raises(ValueError, match=r"early\.ckpt is from before the first training step"):
        load(early)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load(broken)
    module, rich = SmallModule(), tmp_path / "rich.ckpt"
    module.save_hyperparameters({"config": OmegaConf.create({"width": 8})})
    callback, keep = QuantizationAwareTraining(), ModelCheckpoint(tmp_path, "rich")
    trainer_with(callback, keep, folder=tmp_path, max_epochs=1).fit(module, loader())
    with pytest.raises(ValueError, match=r"GLOBAL omegaconf\..* was not an allowed global"):
        load(rich)
    assert len(fake_quants(module.net)) == 11


def test_a_checkpoint_with_a_damaged_state_dict_is_refused(whole: Run, tmp_path: Path) -> None:
    checkpoint = torch.load(whole.folder / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    name = next(name for name in state if "fake_quant" in name)
    for damaged, words in [
        ([1, 2], "no weights by name"),
        ({1: torch.ones(1)}, "no weights by name"),
        (state | {name: "text"}, "another network than this SmallModule"),
    ]:
        torch.save(checkpoint | {"state_dict": damaged}, tmp_path / "damaged.ckpt")
        with pytest.raises(UserError, match=words):
            QuantizationAwareTraining().load(SmallModule(), tmp_path / "damaged.ckpt")
