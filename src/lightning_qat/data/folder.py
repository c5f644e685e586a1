"""The user's own images, in one folder per class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from lightning_qat.data.augment import Flip, PaddingMode
from lightning_qat.data.image_datamodule import ImageDataModule, LabelledImages
from lightning_qat.data.image_file import read_image
from lightning_qat.data.progress import progress_bar
from lightning_qat.errors import UserError, checked_path

LAYOUT = "Put the images into root/train/<class>/ and root/test/<class>/."


class FolderDataModule(ImageDataModule):
    """Images in `root/train/<class>/` and `root/test/<class>/`, decoded once into memory.

    `read_image` makes square images. An image takes 3 * image_size**2 bytes of memory.

    Args:
        root: folder that holds `train` and `test`, with the same classes.
        image_size: height and width of the network's input, in pixels.
        mean, std: normalization per channel. Default: the values of ImageNet.

    See `ImageDataModule` for the other arguments. Without `val_size` there is no validation.

    Raises:
        UserError: a folder is missing, or there is only one class.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int = 32,
        batch_size: int = 128,
        val_size: int = 0,
        seed: int = 0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        crop_padding: int = 4,
        padding_mode: PaddingMode = "reflect",
        flip: Flip = "random",
        cutout: int = 0,
    ) -> None:
        self.root = Path(checked_path("data.root", root)).expanduser()
        class_names = _class_names(self.root / "train")
        if len(class_names) < 2:
            raise UserError(
                f"{self.root / 'train'} holds one class only, {class_names[0]}: a network needs at "
                f"least two. {LAYOUT}"
            )
        super().__init__(
            class_names=class_names,
            image_size=image_size,
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
        """Decode every image.

        Raises:
            UserError: a class is empty, a class is missing in one folder, or an image cannot be
                decoded.
        """
        in_test = _class_names(self.root / "test")
        if differing := sorted(set(self.class_names) ^ set(in_test)):
            raise UserError(
                f"The classes {', '.join(differing)} are in only one of {self.root / 'train'} and "
                f"{self.root / 'test'}: both need the same classes. {LAYOUT}"
            )
        return self._decoded(self.root / "train"), self._decoded(self.root / "test")

    def _decoded(self, folder: Path) -> LabelledImages:
        try:
            samples = ImageFolder(folder).samples
        except OSError as error:
            raise UserError(
                f"{error}. Add images, or remove the class from train and test."
            ) from error
        try:
            images = np.empty((len(samples), self.image_size, self.image_size, 3), np.uint8)
        except MemoryError as error:
            raise UserError(
                f"{len(samples)} images of {folder} do not fit into memory: {error}. Lower "
                "data.image_size."
            ) from error
        with progress_bar() as progress:
            description = f"Decoding {folder}"
            for image, (path, _) in zip(
                images, progress.track(samples, description=description), strict=True
            ):
                image[:] = np.asarray(read_image(path, self.image_size))
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        return LabelledImages(torch.from_numpy(images), labels)


def _class_names(folder: Path) -> list[str]:
    try:
        names: list[str] = find_classes(folder)[0]
        return names
    except OSError as error:
        raise UserError(f"{folder} holds no class folders: {error}. {LAYOUT}") from error
