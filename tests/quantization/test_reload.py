"""Checkpoints of a quantization run: resumed, and loaded in another process."""

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


def same_batches() -> DataLoader[tuple[Tensor, ...]]:
    """Return four equal batches, because a plain DataLoader cannot resume inside an epoch."""
    x, labels = images(count=16)
    return DataLoader(TensorDataset(x.repeat(4, 1, 1, 1), labels.repeat(4)), batch_size=16)


@dataclass
class Run:
    """The results of a fit."""

    folder: Path
    module: SmallModule
    callback: QuantizationAwareTraining
    momenta: list[Tensor]

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict()) | scales(self.module.net)


def fit(folder: Path, ckpt_path: Path | None = None, **settings: Any) -> Run:
    """Train four epochs with a checkpoint at every step, or resume such a fit."""
    torch.manual_seed(0)
    module = SmallModule()
    callback = QuantizationAwareTraining(
        **{"freeze_observer_epoch": 2, "freeze_batch_norm_epoch": 3, **settings}
    )
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer = trainer_with(callback, every, last, folder=folder, max_epochs=4)
    trainer.fit(module, same_batches(), loader(seed=1), ckpt_path=ckpt_path)
    momenta = [x["momentum_buffer"] for x in trainer.optimizers[0].state.values()]
    return Run(folder, module, callback, momenta)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.usefixtures("no_int8")
@pytest.mark.parametrize("step", [1, 4, 6, 9, 12, 15])
def test_a_run_continued_from_any_step_ends_bit_identical(
    step: int, whole: Run, tmp_path: Path
) -> None:
    resumed = fit(tmp_path, whole.folder / f"step={step}.ckpt")
    assert same(whole.state, resumed.state)
    assert all(map(torch.equal, resumed.momenta, whole.momenta))


@pytest.mark.parametrize("settings", [{"qconfig": "qnnpack"}, {"overrides": {"fc": None}}])
def test_a_run_is_not_continued_with_other_rounding(
    settings: dict[str, Any], whole: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"was trained with .*give it the same"):
        fit(tmp_path, whole.folder / "step=6.ckpt", **settings)


def test_a_checkpoint_is_one_of_the_float_network(whole: Run) -> None:
    checkpoint = torch.load(whole.folder / "last.ckpt", weights_only=True)
    SmallModule().load_state_dict(checkpoint["state_dict"])
    example = checkpoint["lightning_qat"]["net"]["example"]
    assert all(not x.any() for x in example[0]), "it holds somebody's images"


def test_a_checkpoint_reloads_into_a_fresh_module_and_is_trained_on(
    whole: Run, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    callback, fresh = QuantizationAwareTraining(), SmallModule()
    module: Any = callback.load(fresh, whole.folder / "last.ckpt")
    assert module is fresh
    assert "fp32" not in callback.networks  # only `fit` has seen the float network
    x, _ = images()
    assert torch.equal(callback.int8_model(x), whole.callback.int8_model(x))
    trainer = trainer_with(folder=whole.folder)
    assert trainer.test(module, loader(seed=1), verbose=False) == trainer.test(
        whole.module, loader(seed=1), verbose=False
    )
    before = copy.deepcopy(scales(module.net))
    module.net.train()(x)
    assert same(before, scales(module.net))
    trainer_with(callback, folder=tmp_path, max_epochs=1).fit(module, loader())
    assert not same(before, scales(module.net))


def test_another_process_tests_and_reloads_a_checkpoint(whole: Run, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from lightning_qat import QuantizationAwareTraining\n"
        "from pathlib import Path\n"
        "from tests.quantization.networks import SmallModule, images, loader, trainer_with\n"
        "path, folder = sys.argv[1:]\n"
        "trainer = trainer_with(QuantizationAwareTraining(), folder=Path(folder))\n"
        "tested = trainer.test(SmallModule(), loader(seed=1), ckpt_path=path, verbose=False)\n"
        "callback = QuantizationAwareTraining()\n"
        "callback.load(SmallModule(), path)\n"
        "found = {'int8': callback.int8_model(images()[0]), 'tested': tested}\n"
        "torch.save(found, folder + '/found.pt')\n"
    )
    command = [sys.executable, "-c", code, str(whole.folder / "last.ckpt"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert torch.equal(found["int8"], whole.callback.int8_model(images()[0]))
    trainer = trainer_with(folder=tmp_path)
    assert found["tested"] == trainer.test(whole.module, loader(seed=1), verbose=False)


@pytest.mark.parametrize(
    ("kind", "callback_class", "extra"),
    [
        (BuildsLate, QuantizationAwareTraining, []),
        (SmallModule, PostTrainingQuantization, []),
        (SmallModule, QuantizationAwareTraining, [EMAWeightAveraging(decay=0.9)]),
    ],
    ids=["built late", "calibrated", "averaged"],
)
def test_a_saved_checkpoint_gives_the_same_int8_model(
    kind: Any, callback_class: Any, extra: list[Any], tmp_path: Path
) -> None:
    callback, last = callback_class(), ModelCheckpoint(tmp_path, "last")
    trainer = trainer_with(callback, *extra, last, folder=tmp_path, max_epochs=1)
    trainer.fit(kind(), loader())
    if not extra:
        trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = callback_class()
    again.load(kind(), tmp_path / "last.ckpt")
    x, _ = images()
    assert torch.equal(again.int8_model(x), callback.int8_model(x))


class HoldsItsNetwork(pl.LightningModule):
    """A module with the network as an argument, and so as one of the hyperparameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_network_among_the_hyper_parameters_is_saved_and_reloads(tmp_path: Path) -> None:
    callback, best = QuantizationAwareTraining(), ModelCheckpoint(tmp_path, "last", monitor="loss")
    trainer_with(callback, best, folder=tmp_path).fit(HoldsItsNetwork(SmallNet()), loader())
    again = QuantizationAwareTraining()
    again.load(HoldsItsNetwork(SmallNet()), tmp_path / "last.ckpt")
    assert torch.equal(again.int8_model(images()[0]), callback.int8_model(images()[0]))


def leave_a_mark(path: str) -> None:
    Path(path).touch()


class Planted:
    """An object whose pickle calls a function."""

    def __reduce__(self) -> Any:
        return leave_a_mark, ("planted",)


def test_nothing_in_a_checkpoint_is_executed(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = torch.load(whole.folder / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": Planted()}, tmp_path / "planted.ckpt")
    monkeypatch.chdir(tmp_path)
    callback = QuantizationAwareTraining()
    callback.load(SmallModule(), tmp_path / "planted.ckpt")
    assert int8_apart(callback, images()[0]) < 1e-5
    assert not (tmp_path / "planted").exists()


def test_wrong_checkpoints_are_refused_with_what_to_do(whole: Run, tmp_path: Path) -> None:
    def load(path: Path, match: str, module: Any = None, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            QuantizationAwareTraining(**settings).load(module or SmallModule(), path)

    last = whole.folder / "last.ckpt"
    load(tmp_path / "none.ckpt", "there is no checkpoint")
    load(last, r"trained with .*x86.*has .*qnnpack.*give it the same", qconfig="qnnpack")
    load(last, r"no scales of 'net.block' \(it has: 'net'\)", target="net.block")
    wider = SmallNet()
    wider.fc = nn.Linear(8, 5)
    load(last, "another network than this SmallModule", SmallModule(wider))
    trainer = trainer_with(folder=tmp_path, max_epochs=1)
    trainer.fit(SmallModule(), loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    load(tmp_path / "float.ckpt", r"no scales of 'net' \(it has: none\)")
    trainer = trainer_with(QuantizationAwareTraining(), folder=tmp_path, limit_train_batches=0)
    trainer.fit(SmallModule(), loader())
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    load(tmp_path / "early.ckpt", r"early\.ckpt is from before the first training step")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(last.read_bytes()[:1000])
    load(broken, "cannot be read as a checkpoint")
    checkpoint = torch.load(last, weights_only=True)
    state, ours = checkpoint["state_dict"], checkpoint["lightning_qat"]["net"]
    old = {"net.fc.weight_fake_quant.scale": torch.ones(1)} | state
    for damage, match in [
        ({"state_dict": [1, 2]}, "no weights by name"),
        ({"state_dict": {1: torch.ones(1)}}, "no weights by name"),
        ({"state_dict": state | {"net.fc.bias": "text"}}, "another network than this SmallModule"),
        ({"lightning_qat": {"net": 1}}, "are damaged"),
        ({"lightning_qat": {"net": ours | {"plan": {}}}}, "are damaged"),
        ({"lightning_qat": {"net": ours | {"scales": {}}}}, "of another network or qconfig"),
        ({"lightning_qat": None, "state_dict": old}, r"written by lightning_qat 0\.1"),
    ]:
        torch.save(checkpoint | damage, tmp_path / "damaged.ckpt")
        load(tmp_path / "damaged.ckpt", match)
