"""The user's own images become the network's input, or the message names the bad file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_qat.data import FolderDataModule
from lightning_qat.errors import UserError

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four training images and one test image of each class."""
    for name, colour in COLOURS.items():
        for number in range(4):
            save(tmp_path / "train" / name / f"{number}.png", Image.new("RGB", (20, 10), colour))
        save(tmp_path / "test" / name / "0.jpg", Image.new("RGB", (10, 20), colour), quality=95)
    return tmp_path


def set_up(root: Path, image_size: int = 8, **options: Any) -> FolderDataModule:
    datamodule = FolderDataModule(root, image_size=image_size, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def test_classes_come_from_the_folders(root: Path) -> None:
    datamodule = FolderDataModule(root)
    assert datamodule.class_names == ["blue", "red"]
    assert datamodule.num_classes == 2
    assert datamodule.image_size == 32


def test_images_carry_the_label_of_their_folder(root: Path) -> None:
    train, test = set_up(root).load()
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.labels.tolist() == [0, 1]
    for images, labels in (train, test):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (8, 8, 3)
        brightest = images.to(torch.int64).sum(dim=(1, 2)).argmax(dim=1)
        assert brightest.tolist() == [2 if label == 0 else 0 for label in labels]


def test_there_is_no_validation_unless_asked_for(root: Path) -> None:
    assert set_up(root).val_dataloader() == []
    ((_, labels, _),) = set_up(root, val_size=2).val_dataloader()
    assert sorted(labels.tolist()) == [0, 1]


def test_the_square_in_the_middle_is_kept_and_made_smaller(root: Path) -> None:
    pixels = np.zeros((80, 240, 3), np.uint8)
    pixels[:, 80:160] = 100
    pixels[20:60, 100:140] = 200
    save(root / "train" / "blue" / "0.png", Image.fromarray(pixels))
    image = set_up(root).load()[0].images[0, ..., 0]
    expected = torch.full((8, 8), 100)
    expected[2:6, 2:6] = 200
    # Resizing blurs the edges, so compare the other pixels.
    inner, outer = slice(3, 5), slice(1, 7, 5)
    assert torch.equal(image[inner, inner], expected.to(torch.uint8)[inner, inner])
    assert image[0, outer].tolist() == [100, 100]


def test_grey_and_transparent_images_become_rgb(root: Path) -> None:
    save(root / "train" / "blue" / "0.png", Image.new("L", (8, 8), 70))
    save(root / "train" / "blue" / "1.png", Image.new("RGBA", (8, 8), (10, 20, 30, 40)))
    images = set_up(root).load()[0].images
    assert images[0, 0, 0].tolist() == [70, 70, 70]
    assert images[1, 0, 0].tolist() == [217, 218, 220]  # on white


def test_an_image_is_turned_as_its_exif_data_say(root: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # bright on top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    save(root / "train" / "blue" / "0.png", Image.fromarray(pixels), exif=exif)
    image = set_up(root).load()[0].images[0]
    assert image[0].max() == 0
    assert image[-1].min() == 255


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_damaged_image_is_named(root: Path, damage: str) -> None:
    path = root / "train" / "red" / "2.png"
    rng = np.random.default_rng(0)
    save(path, Image.fromarray(rng.integers(0, 256, (50, 50, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:3000] if damage == "truncated" else b"text")
    with pytest.raises(UserError, match=str(path)):
        set_up(root)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_missing_folder_is_named_with_the_layout(root: Path, missing: str) -> None:
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(UserError, match=f"{root / missing}.*root/train/<class>/"):
        set_up(root)


def test_an_empty_class_is_named(root: Path) -> None:
    (root / "train" / "green").mkdir()
    (root / "test" / "green").mkdir()
    with pytest.raises(UserError, match="green"):
        set_up(root)


def test_a_class_in_one_folder_only_is_named(root: Path) -> None:
    save(root / "test" / "green" / "0.png", Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match="The classes green are in only one of"):
        set_up(root)


def test_an_image_size_below_one_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="image_size"):
        FolderDataModule(root, image_size=0)
