"""Crop, flip and cutout are exact and fast, and depend only on (seed, epoch)."""

import itertools
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_qat.data.augment import Augmentation, Flip, PaddingMode

COUNT, SIZE = 200, 8
FILL = [10, 20, 30]


def make(
    *,
    padding: int = 3,
    mode: PaddingMode = "reflect",
    flip: Flip = "random",
    cutout: int = 0,
    seed: int = 0,
) -> Augmentation:
    return Augmentation(
        count=COUNT,
        size=SIZE,
        padding=padding,
        padding_mode=mode,
        flip=flip,
        cutout=cutout,
        fill=FILL,
        seed=seed,
    )


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (COUNT, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)


def all_augmentations(
    image: NDArray[np.uint8], padding: int, mode: PaddingMode, flip: Flip
) -> dict[tuple[int, int, bool], bytes]:
    """Return every (top, left, mirrored) of one image, computed the slow way."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    made = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + SIZE, left : left + SIZE]
            made[top, left, False] = crop.tobytes()
            if flip != "none":
                made[top, left, True] = crop[:, ::-1].tobytes()
    return made


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("mode", ["reflect", "constant"])
@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_every_image_is_one_of_its_crops_and_all_kinds_occur(
    images: Tensor, padding: int, mode: PaddingMode, flip: Flip
) -> None:
    augmentation = make(padding=padding, mode=mode, flip=flip)
    drawn = set()
    for epoch in range(4):
        result = augmentation(images, torch.arange(COUNT), epoch).numpy()
        for image, augmented in zip(images.numpy(), result, strict=True):
            kinds = all_augmentations(image, padding, mode, flip)
            found = [kind for kind, content in kinds.items() if content == augmented.tobytes()]
            assert len(found) == 1
            drawn.add(found[0])
    assert len(drawn) == (2 * padding + 1) ** 2 * (1 if flip == "none" else 2)


def test_the_same_seed_and_epoch_give_the_same_images_in_any_batch(images: Tensor) -> None:
    whole = make()(images, torch.arange(COUNT), 5)
    other = make()
    other(images, torch.arange(COUNT), 4)
    order = torch.randperm(COUNT)
    for indices in order.split(33):
        assert torch.equal(other(images[indices], indices, 5), whole[indices])


def test_epochs_and_seeds_differ_and_do_not_repeat_one_another(images: Tensor) -> None:
    everything = torch.arange(COUNT)
    results = [
        make(seed=seed)(images, everything, epoch) for seed in range(3) for epoch in range(3)
    ]
    for index, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:index])


def test_global_random_state_is_neither_used_nor_changed(images: Tensor) -> None:
    torch.manual_seed(1)
    first = make()(images, torch.arange(COUNT), 0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(make()(images, torch.arange(COUNT), 0), first)


def test_an_alternating_flip_shows_each_image_both_ways_in_any_two_epochs(images: Tensor) -> None:
    augmentation = make(padding=0, flip="alternating")
    epochs = [augmentation(images, torch.arange(COUNT), epoch) for epoch in range(4)]
    for before, after in itertools.pairwise(epochs):
        assert torch.equal(before, after.flip(2))
    mirrored = (epochs[0] != images).flatten(1).any(1)
    assert 0.3 < mirrored.float().mean() < 0.7


@pytest.mark.parametrize("cutout", [1, 3, SIZE])
def test_cutout_paints_one_square_anywhere_and_nothing_else(images: Tensor, cutout: int) -> None:
    images = images.clamp(min=40)  # no pixel has the color of the square
    augmentation = make(padding=0, flip="none", cutout=cutout)
    corners, sides = set(), set()
    for epoch in range(3):
        result = augmentation(images, torch.arange(COUNT), epoch)
        painted = (result == torch.tensor(FILL, dtype=torch.uint8)).all(-1)
        assert torch.equal(result[~painted], images[~painted])
        for mask in painted:
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert mask.sum() == len(rows) * len(columns), "not a rectangle"
            corners.add((int(rows[0]), int(columns[0])))
            sides.add(len(rows))
    smallest = cutout - cutout // 2  # half of it is outside
    assert min(sides) == smallest if cutout < SIZE else min(sides) == SIZE // 2
    assert max(sides) == cutout
    assert len(corners) > (1 if cutout == SIZE else SIZE)


def test_without_any_augmentation_the_images_stay_as_they_are(images: Tensor) -> None:
    augmentation = make(padding=0, flip="none")
    assert torch.equal(augmentation(images, torch.arange(COUNT), 0), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_a_gpu_gives_the_same_images(images: Tensor, mode: PaddingMode) -> None:
    indices = torch.arange(COUNT)
    on_gpu = make(mode=mode, cutout=3)(images.cuda(), indices.cuda(), 0)
    assert torch.equal(on_gpu.cpu(), make(mode=mode, cutout=3)(images, indices, 0))


@pytest.mark.slow
@pytest.mark.alone
def test_one_core_augments_more_than_ten_thousand_cifar_images_a_second() -> None:
    count, batch = 10_000, 256
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
    augmentation = Augmentation(
        count=count,
        size=32,
        padding=4,
        padding_mode="reflect",
        flip="alternating",
        cutout=12,
        fill=FILL,
        seed=0,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        for indices in torch.randperm(count).split(batch):
            augmentation(images[indices], indices, 0).permute(0, 3, 1, 2).float().div_(255)
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    assert count / seconds > 20_000
