"""For every kind of image file, the network gets the picture that an image viewer shows."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_qat.data.image_file import read_image
from lightning_qat.errors import UserError

RAMP = np.arange(0, 2**16, 2**10, dtype=np.uint16).reshape(8, 8)
DEEP = Image.fromarray(np.full((8, 8), 300, np.uint16))
PALETTE = Image.new("P", (8, 8))
PALETTE.putpalette([10, 20, 30])
RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")

ONE_COLOUR: dict[str, tuple[Image.Image, dict[str, Any], list[int]]] = {
    "grey.png": (Image.new("L", (8, 8), 70), {}, [70, 70, 70]),
    "bits.png": (Image.new("1", (8, 8), 1), {}, [255, 255, 255]),
    "palette.png": (PALETTE, {}, [10, 20, 30]),
    "one_pixel.png": (Image.new("RGB", (1, 1), (7, 8, 9)), {}, [7, 8, 9]),
    "strip.png": (Image.new("L", (1, 5000), 9), {}, [9, 9, 9]),
    "inks.tif": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, [255, 0, 0]),
    "half_transparent.png": (Image.new("RGBA", (8, 8), (10, 20, 30, 51)), {}, [206, 208, 210]),
    "transparent_grey.png": (Image.new("LA", (8, 8), (10, 0)), {}, [255, 255, 255]),
    "transparent_palette.png": (PALETTE, {"transparency": 0}, [255, 255, 255]),
    "transparent_colour.png": (RED, {"transparency": (255, 0, 0)}, [255, 255, 255]),
    "transparent_deep.png": (DEEP, {"transparency": 300}, [255, 255, 255]),
    "nearly_transparent_deep.png": (DEEP, {"transparency": 301}, [1, 1, 1]),
    "animation.gif": (RED, {"save_all": True, "append_images": [BLUE]}, [255, 0, 0]),
    "bad_exif.png": (RED, {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff"}, [255, 0, 0]),
}


@pytest.mark.parametrize("name", ONE_COLOUR)
def test_every_kind_becomes_rgb(name: str, tmp_path: Path) -> None:
    image, options, expected = ONE_COLOUR[name]
    with warnings.catch_warnings(action="ignore"):
        image.save(tmp_path / name, **options)
    with warnings.catch_warnings(action="error"):
        pixels = np.asarray(read_image(tmp_path / name, 8))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_and_not_cut_off(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / f"deep.{suffix}")
    assert (np.asarray(read_image(tmp_path / f"deep.{suffix}", 8))[..., 0] == RAMP // 256).all()


def test_values_whose_white_is_unknown_are_refused(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "heights.tif")
    with pytest.raises(UserError, match=r"heights\.tif.*32-bit.*8 or 16 bits"):
        read_image(tmp_path / "heights.tif", 8)


@pytest.mark.parametrize(
    ("size", "words"), [((20000, 10000), "too large.*smaller"), ((1, 60000), "too long and narrow")]
)
def test_what_would_fill_the_memory_is_refused(
    size: tuple[int, int], words: str, tmp_path: Path
) -> None:
    Image.new("1", size).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=rf"huge\.png.*{words}"):
        read_image(tmp_path / "huge.png", 64)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif", "ppm"])
def test_a_truncated_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"half.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{path} cannot be decoded.*intact"):
        read_image(path, 8)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    for name, words in {
        "empty.png": "is no image that can be read: name PNG",
        "text.png": "is no image that can be read: name PNG",
        "none.png": "cannot be read: No such file or directory",
        "": "cannot be read: Is a directory",
    }.items():
        with pytest.raises(UserError, match=f"{tmp_path / name} {words}"):
            read_image(tmp_path / name, 8)
