"""Common properties of all data modules, tested with the digits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_qat.data import DigitsDataModule
from lightning_qat.errors import UserError


class Recorder(pl.LightningModule):
    """A tiny classifier that keeps every batch, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(192, 10)
        self.training_batches: list[tuple[int, Tensor, Tensor]] = []
        self.eval_batches: dict[str, list[tuple[Tensor, Tensor]]] = {"val": [], "test": []}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.training_batches.append((self.current_epoch, images.clone(), labels.clone()))
        logits = self.net(images.flatten(1))
        return torch.nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.eval_batches["val"].append(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.eval_batches["test"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, max_epochs: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(folder: Path, max_epochs: int, ckpt_path: str | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = make_trainer(folder, max_epochs)
    trainer.fit(recorder, datamodule=DigitsDataModule(**options), ckpt_path=ckpt_path)
    return recorder


def set_up(**options: Any) -> DigitsDataModule:
    datamodule = DigitsDataModule(**options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def val_indices(datamodule: DigitsDataModule) -> list[int]:
    loader = datamodule.val_dataloader()
    assert not isinstance(loader, list)
    return torch.cat([indices for _, _, indices in loader]).tolist()


def train_indices(datamodule: DigitsDataModule, epoch: int = 0) -> list[int]:
    loader = datamodule.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    loader.sampler.set_epoch(epoch)
    return torch.cat([indices for _, _, indices in loader]).tolist()


def test_what_the_network_needs_is_known_before_setup() -> None:
    datamodule = DigitsDataModule()
    assert datamodule.num_classes == 10
    assert datamodule.class_names == list("0123456789")
    assert datamodule.image_size == 8
    assert len(datamodule.mean) == len(datamodule.std) == 3


def test_validation_is_a_stratified_part_of_training_the_same_for_every_seed() -> None:
    datamodule = set_up(seed=0, val_size=100)
    val = val_indices(datamodule)
    assert len(val) == 100
    assert sorted(val + train_indices(set_up(val_size=100, batch_size=1))) == list(range(1437))
    assert val == val_indices(set_up(seed=7, val_size=100))
    labels = torch.cat([labels for _, labels, _ in datamodule.val_dataloader()])
    assert torch.bincount(labels).tolist() == [10] * 10


def test_the_training_order_comes_from_seed_and_epoch() -> None:
    datamodules = [set_up(seed=seed) for seed in range(3)]
    orders = [train_indices(datamodule, epoch) for datamodule in datamodules for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    torch.manual_seed(3)
    assert train_indices(set_up(seed=0), epoch=2) == orders[2]


def test_two_processes_share_the_training_set() -> None:
    shares = []
    for rank in range(2):
        datamodule = set_up(batch_size=1)
        datamodule.trainer = cast(pl.Trainer, SimpleNamespace(world_size=2, global_rank=rank))
        shares.append(set(train_indices(datamodule)))
    # 1293 images: both processes get one of them, so that the shares are equal.
    assert len(shares[0] | shares[1]) == 1293
    assert len(shares[0] & shares[1]) == 1


def test_evaluation_is_in_order_and_whole() -> None:
    datamodule = set_up(batch_size=300)
    batches = list(datamodule.test_dataloader())
    assert [len(labels) for _, labels, _ in batches] == [300, 60]
    assert torch.cat([indices for _, _, indices in batches]).tolist() == list(range(360))


@pytest.mark.parametrize(("batch_size", "last"), [(1436, 1436), (1435, 2), (400, 237)])
def test_a_last_batch_of_one_image_is_dropped_and_no_other(batch_size: int, last: int) -> None:
    loader = set_up(val_size=0, batch_size=batch_size).train_dataloader()
    sizes = [len(labels) for _, labels, _ in loader]
    assert sizes[-1] == last
    assert len(sizes) == len(loader)


def test_a_trainer_gets_floats_and_augments_in_training_only(tmp_path: Path) -> None:
    recorder = Recorder()
    datamodule = DigitsDataModule(crop_padding=2, flip="random")
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(recorder, datamodule=datamodule)
    trainer.test(recorder, datamodule=datamodule, verbose=False)

    digits = load_digits()
    known = {(image / 16).astype("float32").tobytes() for image in digits.images}
    for name, count in (("val", 144), ("test", 360)):
        images = torch.cat([images for images, _ in recorder.eval_batches[name]])
        assert all(image[0].numpy().tobytes() in known for image in images)
        assert len(images) >= count
    trained = torch.cat([images for _, images, _ in recorder.training_batches])
    unchanged = sum(image[0].numpy().tobytes() in known for image in trained)
    assert unchanged / len(trained) < 0.2

    for _, images, labels in recorder.training_batches:
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    assert trained.min() == 0
    assert trained.max() == 1


def test_the_same_image_looks_different_in_another_epoch() -> None:
    datamodule = set_up(crop_padding=2)
    batch = next(iter(datamodule.train_dataloader()))
    seen = []
    for epoch in (0, 1, 0):
        trainer = SimpleNamespace(training=True, current_epoch=epoch)
        datamodule.trainer = cast(pl.Trainer, trainer)
        seen.append(datamodule.on_after_batch_transfer(batch, 0)[0])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_trainer_copes_without_validation(tmp_path: Path) -> None:
    recorder = fit(tmp_path, max_epochs=2, val_size=0)
    assert not recorder.eval_batches["val"]
    for epoch in range(2):
        seen = sum(len(labels) for e, _, labels in recorder.training_batches if e == epoch)
        assert seen == 1437


def test_a_resumed_run_sees_what_the_whole_one_would_have(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", max_epochs=4, batch_size=128)
    fit(tmp_path / "parts", max_epochs=2, batch_size=128)
    (checkpoint,) = (tmp_path / "parts").rglob("*.ckpt")
    torch.manual_seed(99)
    resumed = fit(tmp_path / "parts", max_epochs=4, ckpt_path=str(checkpoint), batch_size=128)

    expected = [batch for batch in whole.training_batches if batch[0] >= 2]
    assert len(resumed.training_batches) == len(expected)
    for (epoch, images, labels), (epoch_, images_, labels_) in zip(
        resumed.training_batches, expected, strict=True
    ):
        assert epoch == epoch_
        assert torch.equal(labels, labels_)
        assert torch.equal(images, images_)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_floats() -> None:
    batch = next(iter(set_up().test_dataloader()))
    datamodule = set_up()
    images, _ = datamodule.on_after_batch_transfer(batch, 0)
    on_gpu, _ = datamodule.on_after_batch_transfer(tuple(part.cuda() for part in batch), 0)
    assert torch.equal(images, on_gpu.cpu())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("padding_mode", "mirror"),
        ("flip", True),
        ("cutout", 9),
        ("mean", [0.5]),
        ("mean", [125.3, 123.0, 113.9]),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_permitted(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        DigitsDataModule(**{name: value})


@pytest.mark.parametrize("val_size", [1, 9, 1437, 5000])
def test_a_val_size_that_would_leave_a_class_out_is_refused(val_size: int) -> None:
    with pytest.raises(UserError, match=r"a number from 11 to 1426, or 0"):
        set_up(val_size=val_size)


@pytest.mark.parametrize("val_size", [11, 1426])
def test_the_permitted_limits_of_val_size_work(val_size: int) -> None:
    datamodule = set_up(val_size=val_size, batch_size=2)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        labels = torch.cat([labels for _, labels, _ in loader])
        assert len(labels.unique()) == 10
