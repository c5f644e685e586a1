"""Read image files of many formats as small RGB squares, the input of networks."""

import errno
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import center_crop, resize

from lightning_qat.errors import UserError

PROGRAMS = ("EPS",)
"""Formats for which Pillow starts an interpreter."""

MOST_PIXELS = 2**26  # of a resized image before it is cut: 200 MB


def read_image(path: str | Path, size: int) -> Image.Image:
    """Return the first picture in a file: RGB, 8 bits per channel, ``size`` x ``size`` pixels.

    Rotate the picture as its EXIF data say, put transparent parts on white, resize the short side
    to ``size``, and cut out the square in the middle.

    Raises:
        UserError: the file cannot be read, is no image, is damaged or too large.
    """
    try:
        # Pillow also warns about files that it can read.
        with warnings.catch_warnings(action="ignore"), _opened(Path(path)) as file:
            image = _rgb(ImageOps.exif_transpose(file), file.format)
        # The long side grows by the same factor as the short side.
        if size**2 * max(image.size) / min(image.size) > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow")
        square: Image.Image = center_crop(resize(image, [size]), [size, size])
        return square
    except Exception as error:  # a damaged image makes Pillow raise almost any exception
        raise UserError(f"{path} {_what_is_wrong(error)}") from error


def _opened(path: Path) -> Image.Image:
    # reading such a file may never end
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "It is a pipe or a device, not a file")
    Image.init()
    return Image.open(path, formats=[name for name in Image.OPEN if name not in PROGRAMS])


def _rgb(image: Image.Image, format_: str | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and format_ in ("PNG", "PPM")):
        # Pillow would clip the values at 255. For 16-bit colors, it also takes the high byte.
        # the grey value that is transparent
        raw, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.where(raw == clear, 255, raw >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("it has 32-bit values, and their value for white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _what_is_wrong(error: Exception) -> str:
    match error:
        case UnidentifiedImageError():
            return "is no image that can be read: name PNG, JPEG, WebP, GIF, BMP or TIFF files."
        case Image.DecompressionBombError():
            return f"is too large an image: {str(error).split(',')[0]}. Make it smaller."
        case OSError(strerror=str()):
            return f"cannot be read: {error.strerror}. Name image files."
    return (
        f"cannot be decoded: {str(error) or type(error).__name__}. Replace it with an intact image "
        "of 8 or 16 bits per channel, or remove it."
    )
