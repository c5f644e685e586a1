"""``python -m lightning_qat.predict MODEL IMAGE...``: classify images with an exported model."""

import argparse
import io
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lightning_qat.errors import UserError

if TYPE_CHECKING:  # the import of torch takes seconds, and --help does not need it
    from torch import Tensor

    from lightning_qat.deployment.description import Description
    from lightning_qat.deployment.runtimes import Runtime

SHOWN = 3  # classes per image: 80 columns have no space for more
WIDEST_NAME, WIDEST_CLASS = 40, 20  # shorter names are padded to at most this many columns
USERS_MISTAKE = 2

EPILOG = """\
Each image gives one line: its name, the most probable class, and the next two.
A terminal shows them in columns; elsewhere tabs separate them, and
probabilities go from 0 to 1.

An image may have any size: the largest square in its middle counts. It is
turned as its EXIF data say, transparent parts count as white, and of an
animation the first picture counts.

Exit status: 0 done; 2 the model or an image cannot be read, which a message on
stderr explains. The other images are classified all the same.

Example: python -m lightning_qat.predict model_int8.onnx photos/*.jpg
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_qat.predict",
        description="Classify image files with an exported model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a run's model_int8.ts, .onnx or .xml (with its .bin)"
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="PNG, JPEG, WebP, GIF, BMP, TIFF and others"
    )
    options = parser.parse_args(arguments)
    from lightning_qat.deployment.runtimes import load

    try:
        runtime = load(options.model)
        return _classify_all(runtime, options.images)
    except UserError as error:
        parser.error(str(error))


def _classify_all(runtime: "Runtime", paths: list[str]) -> int:
    classes = runtime.description.classes
    name_width = min(max(cell_len(_printable(path)) for path in paths), WIDEST_NAME)
    class_width = min(max(cell_len(_printable(name)) for name in classes), WIDEST_CLASS)
    status = 0
    for path in paths:  # one at a time: memory stays small, and each line appears at once
        try:
            image = load_image(path, runtime.description)
        except UserError as error:
            print(_printable(str(error)), file=sys.stderr)
            status = USERS_MISTAKE
            continue
        shares, indices = _probabilities(runtime, image).topk(min(SHOWN, len(classes)))
        names = [_printable(classes[i]) for i in indices.tolist()]
        _show(_printable(path), name_width, names, class_width, shares.tolist())
    return status


def load_image(path: str | Path, description: "Description") -> "Tensor":
    """Read an image file as the input of a model: 1 x 3 x image_size x image_size, RGB.

    Round the 256 levels to the levels of the training images, from 0 to ``max_value``.

    Raises:
        UserError: the file cannot be read, is no image, is damaged or too large.
    """
    import numpy as np
    import torch

    from lightning_qat.data.image_file import read_image
    from lightning_qat.deployment.description import PIXELS

    rgb = np.array(read_image(path, description.image_size))
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0).contiguous()
    levels = (pixels * (description.max_value / 255)).round()
    if description.input == PIXELS:
        return levels.to(torch.uint8)
    return levels / description.max_value


def _probabilities(runtime: "Runtime", image: "Tensor") -> "Tensor":
    try:
        logits = runtime(image)
        return logits.softmax(1).view(len(runtime.description.classes))
    except Exception as error:  # each runtime raises its own error for invalid input
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the model does not fit its own description ({reason}): it has been changed since its "
            "export; export it again."
        ) from error


def _show(
    path: str, name_width: int, names: list[str], class_width: int, shares: list[float]
) -> None:
    console = Console()
    if not console.is_terminal:
        fields = (f"{name}\t{share:.4f}" for name, share in zip(names, shares, strict=True))
        print(path, *fields, sep="\t", flush=True)
        return
    best, *others = (f"{share:.1%}" for share in shares)
    line = Text(path + " " * (name_width - cell_len(path)) + "  ")
    line.append(names[0] + " " * (class_width - cell_len(names[0])) + best.rjust(7), "bold")
    line.append("   " + ", ".join(map(" ".join, zip(names[1:], others, strict=True))))
    console.print(line, soft_wrap=True)


def _printable(text: str) -> str:
    """Return ``text``, or its ``repr`` if it holds characters that move the cursor."""
    return text if text.isprintable() else repr(text)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that the encoding lacks
    sys.exit(main())
