"""Properties of splits and augmentations for all sizes and seeds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qat.data.augment import Augmentation
from lightning_qat.data.image_datamodule import ImageDataModule, LabelledImages
from lightning_qat.errors import UserError
from lightning_qat.network import resnet18

bounded: Callable[..., Any] = settings(max_examples=60, derandomize=True, deadline=None)


class Made(ImageDataModule):
    """Images whose first pixel identifies them."""

    def __init__(self, labels: list[int], **options: Any) -> None:
        defaults: dict[str, Any] = {
            "image_size": 4, "batch_size": 7, "val_size": 0, "seed": 0, "mean": (0.5,) * 3,
            "std": (0.5,) * 3, "crop_padding": 0, "padding_mode": "constant", "flip": "none",
            "cutout": 0,
        }  # fmt: skip
        super().__init__(class_names=["a", "b", "c", "d"], **(defaults | options))
        self.labels = torch.tensor(labels)

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        images = torch.zeros((len(self.labels), self.image_size, self.image_size, 3))
        images[:] = torch.arange(len(self.labels))[:, None, None, None]
        data = LabelledImages(images.byte(), self.labels)
        return data, data


def indices(loader: Any) -> list[int]:
    return torch.cat([indices for _, _, indices in loader]).tolist() if loader else []


@bounded
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=120),
    val_size=st.integers(0, 130),
    seed=st.integers(0, 2**32 - 1),
    other=st.integers(0, 2**32 - 1),
    batch_size=st.integers(2, 40),
)
def test_a_split_is_disjoint_complete_stratified_and_the_same_for_every_seed(
    labels: list[int], val_size: int, seed: int, other: int, batch_size: int
) -> None:
    made = Made(labels, val_size=val_size, seed=seed, batch_size=batch_size)
    rarest = min(labels.count(label) for label in set(labels))
    if val_size and rarest * min(val_size, len(labels) - val_size) < len(labels):
        # One of the two parts could have no image of a class.
        with pytest.raises(UserError, match=f"val_size={val_size} cannot be taken"):
            made.setup("fit")
        return
    made.setup("fit")
    val, train = indices(made.val_dataloader()), indices(made.train_dataloader())
    assert len(val) == val_size
    assert not set(val) & set(train)
    left = len(labels) - val_size
    assert len(set(train)) == len(train) == left - (left % batch_size == 1)  # see drop_last
    again = Made(labels, val_size=val_size, seed=other, batch_size=1)
    again.setup("fit")
    assert indices(again.val_dataloader()) == val
    assert sorted(indices(again.train_dataloader()) + val) == list(range(len(labels)))
    if val_size:
        for label in set(labels):
            share = sum(labels[index] == label for index in val)
            assert abs(share - val_size * labels.count(label) / len(labels)) <= 1
            assert 0 < share < labels.count(label)


@st.composite
def augmentations(draw: Any) -> tuple[Augmentation, Tensor, Tensor, dict[str, Any]]:
    size, count = draw(st.integers(1, 33)), draw(st.integers(1, 20))
    options = {
        "count": count,
        "size": size,
        "padding": draw(st.integers(0, size)),
        "padding_mode": draw(st.sampled_from(["reflect", "constant"])),
        "flip": draw(st.sampled_from(["none", "random", "alternating"])),
        "cutout": draw(st.integers(0, size)),
        "fill": [7, 8, 9],
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    images = torch.randint(10, 256, (count, size, size, 3), generator=generator).byte()
    batch = torch.randperm(count, generator=generator)[: draw(st.integers(1, count))]
    return Augmentation(**options), images, batch, options


@bounded
@given(made=augmentations(), epoch=st.integers(0, 1000))
def test_an_augmentation_keeps_shape_and_type_and_invents_no_pixel(
    made: tuple[Augmentation, Tensor, Tensor, dict[str, Any]], epoch: int
) -> None:
    augmentation, images, batch, options = made
    result = augmentation(images[batch], batch, epoch)
    assert (result.shape, result.dtype) == (images[batch].shape, torch.uint8)
    padded = options["padding"] and options["padding_mode"] == "constant"
    for before, after in zip(images[batch], result, strict=True):
        possible = set(map(tuple, before.flatten(0, 1).tolist()))
        possible |= {(7, 8, 9)} if options["cutout"] else set()
        possible |= {(0, 0, 0)} if padded else set()
        assert set(map(tuple, after.flatten(0, 1).tolist())) <= possible
    alone = augmentation(images[batch[:1]], batch[:1], epoch)
    assert torch.equal(alone, result[:1])  # for any batch


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    size=st.integers(1, 41),
    batch=st.integers(1, 5),
    classes=st.integers(2, 12),
    stem=st.sampled_from(["cifar", "imagenet"]),
)
@torch.no_grad()
def test_the_network_takes_images_of_any_size(
    size: int, batch: int, classes: int, stem: Any
) -> None:
    net = resnet18(classes, stem).eval()
    logits = net(torch.rand(batch, 3, size, size))
    assert logits.shape == (batch, classes)
    assert logits.isfinite().all()
