"""The digits of scikit-learn: 1797 grey images of 8 x 8 pixels. They need no download."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_qat.data.augment import Flip, PaddingMode
from lightning_qat.data.image_datamodule import ImageDataModule, LabelledImages

# Of the pixels / 16 of the 1437 training images.
DIGITS_MEAN = 0.3054
DIGITS_STD = 0.3761


class DigitsDataModule(ImageDataModule):
    """The digits as 8 x 8 RGB images with three equal channels: 1437 for training, 360 for test.

    See `ImageDataModule` for the arguments.
    """

    max_value = 16

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_size: int = 144,
        seed: int = 0,
        mean: Sequence[float] = (DIGITS_MEAN,) * 3,
        std: Sequence[float] = (DIGITS_STD,) * 3,
        crop_padding: int = 1,
        padding_mode: PaddingMode = "constant",
        flip: Flip = "none",
        cutout: int = 0,
    ) -> None:
        super().__init__(
            class_names=[str(digit) for digit in range(10)],
            image_size=8,
            batch_size=batch_size,
            val_size=val_size,
            seed=seed,
            mean=mean,
            std=std,
            crop_padding=crop_padding,
            padding_mode=padding_mode,
            flip=flip,
            cutout=cutout,
        )

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Split the 1797 images. The split is always the same."""
        digits = load_digits()
        grey = torch.from_numpy(digits.images).to(torch.uint8)
        images = grey.unsqueeze(-1).repeat(1, 1, 1, 3)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        train, test = train_test_split(
            range(len(labels)), test_size=360, stratify=digits.target, random_state=0
        )
        return (
            LabelledImages(images[train], labels[train]),
            LabelledImages(images[test], labels[test]),
        )
