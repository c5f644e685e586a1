"""Common parts of all image data sets: the split, the order, the loaders, and the step to float."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_qat.data.augment import Augmentation, Flip, PaddingMode, derived_seed
from lightning_qat.errors import UserError, checked_float, checked_int

EVAL_BATCH_SIZE = 250  # evaluation stores no gradients, so larger batches fit

LARGEST_IMAGE = 2**13  # pixels: of larger images, not even one batch fits into memory

Batch = tuple[Tensor, Tensor, Tensor]


class LabelledImages(NamedTuple):
    """Images, uint8 N x H x W x 3, and labels, int64 N."""

    images: Tensor
    labels: Tensor


class ImageSubset(Dataset[Batch]):
    """Some images of a larger set. They are copied only when a batch is fetched."""

    def __init__(self, data: LabelledImages, indices: Tensor) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Batch:
        """Return images uint8 N x H x W x 3, labels int64 N, and indices int64 N in the set."""
        indices = self.indices[positions]
        return self.data.images[indices], self.data.labels[indices], indices


def _of_channels(name: str, values: Any, lowest: float) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
        raise UserError(
            f"{name}={values!r} is not permitted: mean and std need three values each, for red, "
            "green and blue."
        )
    return tuple(
        checked_float(f"{name}[{channel}], of images in [0, 1],", value, lowest, highest=1)
        for channel, value in enumerate(values)
    )


def _as_fetched(batch: Any) -> Any:
    """Return the batch unchanged, because `ImageSubset` already returns whole batches."""
    return batch


class ImageDataModule(pl.LightningDataModule):
    """Square RGB images in memory. A subclass provides them in `load`.

    The loaders return (uint8 images N x H x W x 3, int64 labels, int64 indices). On the device,
    `on_after_batch_transfer` turns them into (float32 images N x 3 x H x W in [0, 1],
    channels_last, labels). Only training images are augmented. The order and the augmentation
    depend only on (seed, epoch), so a resumed run sees the same images as an uninterrupted run.

    Args:
        class_names: one name per class, in the order of the labels.
        image_size: height and width in pixels.
        batch_size: training images per step and process.
        val_size: number of training images that are kept for validation. The choice is stratified
            and the same for every `seed`. 0 = no validation.
        seed: seed of the order and the augmentation.
        mean, std: normalization per channel, for images in [0, 1]. The network applies it. Here,
            the mean is only the color of `cutout`.
        crop_padding: pixels around an image before a random crop; 0 = no crop.
        padding_mode: `reflect` or `constant` (zeros).
        flip: left-right flip of training images: `none`, `random` or `alternating`.
        cutout: side in pixels of a square that is painted over each training image; 0 = none.

    Raises:
        UserError: a value is out of its range.
    """

    max_value = 255
    """The pixel value that stands for 1."""

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        image_size: int,
        batch_size: int,
        val_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int,
        padding_mode: PaddingMode,
        flip: Flip,
        cutout: int,
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_size = checked_int("image_size", image_size, lowest=1, highest=LARGEST_IMAGE)
        self.batch_size = checked_int("batch_size", batch_size, lowest=1)
        self.val_size = checked_int("val_size", val_size, lowest=0)
        self.seed = checked_int("seed", seed, lowest=0, highest=2**32 - 1)
        self.crop_padding = checked_int("crop_padding", crop_padding, lowest=0, highest=image_size)
        if padding_mode not in ("reflect", "constant"):
            raise UserError(
                f"padding_mode={padding_mode!r} does not exist: set it to 'reflect' or 'constant'."
            )
        self.padding_mode: PaddingMode = padding_mode
        if flip not in ("none", "random", "alternating"):
            raise UserError(
                f"flip={flip!r} does not exist: set it to 'none', 'random' or 'alternating'."
            )
        self.flip: Flip = flip
        self.cutout = checked_int("cutout", cutout, lowest=0, highest=image_size)
        # A mean above 1 belongs to bytes, not to images in [0, 1].
        self.mean = _of_channels("mean", mean, lowest=0)
        self.std = _of_channels("std", std, lowest=1e-6)
        self._is_loaded = False

    @abstractmethod
    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Return the training set (with the validation images) and the test set."""

    def setup(self, stage: str) -> None:
        """Load and split the images once, for all stages.

        Raises:
            UserError: `val_size` leaves some class without a training image or a validation image.
        """
        if self._is_loaded:
            return
        # The images are in memory and a batch is one gather, so worker processes would be slower.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        if not self.val_size:  # an empty validation set is intended here
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        self._train, self._test = self.load()
        self._train_indices, self._val_indices = self._split(self._train.labels)
        self._augmentation = Augmentation(
            count=len(self._train.labels),
            size=self.image_size,
            padding=self.crop_padding,
            padding_mode=self.padding_mode,
            flip=self.flip,
            cutout=self.cutout,
            fill=[round(self.max_value * value) for value in self.mean],
            seed=self.seed,
        )
        self._is_loaded = True

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffle by (seed, epoch). Lightning passes the epoch to the sampler."""
        dataset = ImageSubset(self._train, self._train_indices)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            dataset,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=derived_seed(self.seed),
        )
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            # Drop a last batch of one image, because batch-norm cannot train on it. Keep larger
            # ones.
            drop_last=self.batch_size > 1 and len(sampler) % self.batch_size == 1,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the validation images in order, or no loader if `val_size` is 0."""
        if not self.val_size:
            return []
        return self._eval_dataloader(ImageSubset(self._train, self._val_indices))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the whole test set in order."""
        return self._eval_dataloader(ImageSubset(self._test, torch.arange(len(self._test.labels))))

    @property
    def test_labels(self) -> Tensor:
        """Return the labels of the whole test set, int64 N."""
        return self._test.labels

    def test_images(self, indices: Tensor) -> Tensor:
        """Return some images of the test set, float32 N x 3 x H x W in [0, 1]."""
        return self._test.images[indices].permute(0, 3, 1, 2).float() / self.max_value

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Make float32 images N x 3 x H x W in [0, 1], channels_last, and int64 labels N."""
        images, labels, indices = batch
        if self.trainer is not None and self.trainer.training:
            images = self._augmentation(images, indices, self.trainer.current_epoch)
        # Divide by a tensor: for a Python number, CUDA multiplies by the rounded reciprocal.
        scale = torch.full((), self.max_value, dtype=torch.float32, device=images.device)
        return images.permute(0, 3, 1, 2).float().div_(scale), labels

    def _eval_dataloader(self, dataset: ImageSubset) -> DataLoader[Batch]:
        batch_size = max(self.batch_size, EVAL_BATCH_SIZE)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
        )

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the training and the validation images, int64, ascending."""
        everything = np.arange(len(labels))
        if not self.val_size:
            return torch.from_numpy(everything), torch.empty(0, dtype=torch.int64)
        # If each part has a share of at least 1 / rarest, it holds at least one image of each
        # class.
        counts = torch.bincount(labels)
        rarest = int(counts[counts > 0].min())
        lowest = -(-len(labels) // rarest)
        highest = len(labels) - lowest
        if not lowest <= self.val_size <= highest:
            permitted = f"a number from {lowest} to {highest}, or 0" if lowest <= highest else "0"
            raise UserError(
                f"val_size={self.val_size} cannot be taken from {len(labels)} training images: "
                "every class needs an image on both sides of the stratified split. "
                f"Set it to {permitted} for no validation."
            )
        train, val = train_test_split(
            everything, test_size=self.val_size, stratify=labels.numpy(), random_state=0
        )
        return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))
