"""CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_qat.data.augment import Flip, PaddingMode
from lightning_qat.data.cifar10_cache import build_cache, read_cache
from lightning_qat.data.cifar10_records import CIFAR10_SHA1, TEST_BATCH, TRAIN_BATCHES, unpacked
from lightning_qat.data.image_datamodule import ImageDataModule, LabelledImages
from lightning_qat.errors import UserError, checked_path

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10, identical to the official images byte for byte, from every source.

    Args:
        root: folder of the decoded cache `cifar10.npz`. If official files are in this folder, they
            are used; otherwise the images are downloaded.
        sha1: SHA-1 digest of each batch in the official binary layout.

    See `ImageDataModule` for the other arguments.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        sha1: Mapping[str, str] = CIFAR10_SHA1,
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        crop_padding: int = 4,
        padding_mode: PaddingMode = "reflect",
        flip: Flip = "random",
        cutout: int = 0,
    ) -> None:
        super().__init__(
            class_names=CIFAR10_CLASSES,
            image_size=32,
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
        self.root = Path(checked_path("data.root", root)).expanduser()
        self.sha1 = dict(sha1)

    def prepare_data(self) -> None:
        """Make the cache if it does not exist. Several processes may call this at once.

        Raises:
            UserError: no source has the images, a source has wrong images, or `root` cannot be
                used.
        """
        build_cache(self.root, self.sha1)

    def load(self) -> tuple[LabelledImages, LabelledImages]:
        """Load training and test images from the cache."""
        batches = read_cache(self.root, self.sha1)
        if batches is None:
            raise UserError(
                f"The CIFAR-10 cache in {self.root} is missing or damaged: call prepare_data() "
                "before setup(); on several machines, give data.root a folder they share."
            )
        train = unpacked([batches[name] for name in TRAIN_BATCHES])
        test = unpacked([batches[TEST_BATCH]])
        return LabelledImages(*train), LabelledImages(*test)
