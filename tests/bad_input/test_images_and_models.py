"""`lightning_qat.predict` names images and model files that it cannot use."""

import contextlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_qat.data.image_file import read_image
from lightning_qat.deployment.description import KEY
from lightning_qat.deployment.runtimes import LONGEST_DESCRIPTION
from lightning_qat.errors import UserError
from tests.bad_input.conftest import state
from tests.deployment.artifacts import CLASSES, description
from tests.test_predict import Run, photo, run

__all__ = ["photo", "run"]  # fixtures

Spoil = Callable[[Path, Path], object]


def without_pixels(file: Path, photo: Path) -> None:
    header = b"IHDR" + struct.pack(">2I5B", 0, 0, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    packed = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def animated(file: Path, photo: Path) -> None:
    first, second = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    first.save(file, save_all=True, append_images=[second])


# name: how to make the bad file, words of the message; None = it is classified
IMAGES: dict[str, tuple[Spoil, str | None]] = {
    "missing.png": (lambda file, photo: None, "No such file"),
    "empty.png": (lambda file, photo: file.touch(), "is no image"),
    "text.png": (lambda file, photo: file.write_text("no image"), "is no image"),
    "page.png": (lambda file, photo: file.write_text("<html>"), "is no image"),
    "program.png": (lambda file, photo: Image.new("L", (4, 4)).save(file, "EPS"), "is no image"),
    "folder.png": (lambda file, photo: file.mkdir(), "Is a directory"),
    "pipe.png": (lambda file, photo: os.mkfifo(file), "a pipe or a device"),
    "link.png": (lambda file, photo: file.symlink_to("nowhere"), "No such file"),
    "loop.png": (lambda file, photo: file.symlink_to(file), "symbolic links"),
    "truncated.png": (
        lambda file, photo: file.write_bytes(photo.read_bytes()[:1000]),
        "cannot be decoded",
    ),
    "no_pixels.png": (without_pixels, "is no image"),
    "bomb.png": (lambda file, photo: Image.new("1", (20_000, 10_000)).save(file), "too large"),
    "strip.png": (lambda file, photo: Image.new("1", (1, 2_000_000)).save(file), "too long"),
    "heights.tif": (lambda file, photo: Image.new("F", (4, 4)).save(file), "32-bit"),
    "animated.gif": (animated, None),
    "one_pixel.png": (lambda file, photo: Image.new("RGB", (1, 1)).save(file), None),
    "inks.jpg": (lambda file, photo: Image.new("CMYK", (4, 4)).save(file), None),
    "no_png.png": (lambda file, photo: Image.new("L", (4, 4)).save(file, format="BMP"), None),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image(name: str, exported: dict[str, Path], photo: Path, run: Run, tmp_path: Path) -> None:
    spoil, words = IMAGES[name]
    spoil(tmp_path / name, photo)
    before = state(tmp_path)
    status, lines, errors = run(exported["onnx"], tmp_path / name, photo)
    shown = [photo] if words else [tmp_path / name, photo]
    assert (status, [line[0] for line in lines]) == (2 if words else 0, list(map(str, shown)))
    assert "Traceback" not in errors
    if words:
        (message,) = errors.splitlines()
        assert message.startswith(f"{tmp_path / name} ")
        assert words in message
    assert state(tmp_path) == before


def test_control_characters_of_a_bad_name_do_not_reach_the_terminal(
    exported: dict[str, Path], run: Run
) -> None:
    status, _, errors = run(exported["onnx"], "\x1b[2Jnone.png")
    assert status == 2
    assert "\x1b" not in errors
    assert r"\x1b[2Jnone.png cannot be read" in errors


def cut(file: Path, good: Path) -> None:
    file.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def copied(file: Path, good: Path) -> None:
    file.write_bytes(good.read_bytes())


def flipped(file: Path, good: Path) -> None:
    content = bytearray(good.read_bytes())
    for index in range(0, len(content), 97):
        content[index] ^= 0xFF
    file.write_bytes(content)


def undescribed_onnx(file: Path, good: Path) -> None:
    proto = onnx.load(good)
    del proto.metadata_props[:]
    onnx.save(proto, file)


def redescribed_onnx(text: str) -> Spoil:
    def spoil(file: Path, good: Path) -> None:
        proto = onnx.load(good)
        onnx.helper.set_model_props(proto, {KEY: text})
        onnx.save(proto, file)

    return spoil


def other_input(file: Path, good: Path) -> None:
    proto = onnx.load(good)
    for node in proto.graph.node:
        node.input[:] = ["pictures" if name == "images" else name for name in node.input]
    proto.graph.input[0].name = "pictures"
    onnx.save(proto, file)


def two_inputs(file: Path, good: Path) -> None:
    proto = onnx.load(good)
    more = onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1])
    proto.graph.input.append(more)
    onnx.save(proto, file)


def undescribed_torchscript(file: Path, good: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(file)


def bomb_of_a_description(file: Path, good: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        text = description().to_json() + " " * LONGEST_DESCRIPTION  # valid, but too long
        archive.writestr(f"model/extra/{KEY}.json", text)


def zip_of_text(file: Path, good: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"model/extra/{KEY}.json", description().to_json())


def with_its_weights(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(file: Path, good: Path) -> None:
        copied(file, good)
        file.with_suffix(".bin").write_bytes(change(good.with_suffix(".bin").read_bytes()))

    return spoil


def undescribed_openvino(file: Path, good: Path) -> None:
    with_its_weights(bytes)(file, good)
    file.write_text(good.read_text().replace(f"<{KEY} ", "<other "))


NO_DESCRIPTION = "has no description by lightning_qat"
# name and kind of the good file, how to damage it, words of the message
MODELS: dict[str, tuple[str, str, Spoil, str]] = {
    "missing": ("m.onnx", "onnx", lambda file, good: None, "does not exist"),
    "another suffix": ("m.pt", "ts", copied, "is no exported model"),
    "no suffix": ("model", "ts", copied, "is no exported model"),
    "folder": ("m.onnx", "onnx", lambda file, good: file.mkdir(), "does not exist"),
    "pipe": ("m.onnx", "onnx", lambda file, good: os.mkfifo(file), "does not exist"),
    "dangling link": ("m.ts", "ts", lambda file, good: file.symlink_to("no"), "does not exist"),
    "ONNX: empty": ("m.onnx", "onnx", lambda file, good: file.touch(), "cannot be loaded"),
    "ONNX: text": ("m.onnx", "onnx", lambda file, good: file.write_text("no"), "cannot be loaded"),
    "ONNX: truncated": ("m.onnx", "onnx", cut, "cannot be loaded"),
    "ONNX: corrupted": ("m.onnx", "onnx", flipped, "cannot be loaded"),
    "ONNX: TorchScript": ("m.onnx", "ts", copied, "cannot be loaded"),
    "ONNX: undescribed": ("m.onnx", "onnx", undescribed_onnx, NO_DESCRIPTION),
    "ONNX: described by a list": ("m.onnx", "onnx", redescribed_onnx("[1]"), NO_DESCRIPTION),
    "ONNX: described by text": ("m.onnx", "onnx", redescribed_onnx("cat"), NO_DESCRIPTION),
    "ONNX: no classes": (
        "m.onnx",
        "onnx",
        redescribed_onnx(description(classes=[]).to_json()),
        NO_DESCRIPTION,
    ),
    "ONNX: no size": (
        "m.onnx",
        "onnx",
        redescribed_onnx(json.dumps(json.loads(description().to_json()) | {"image_size": None})),
        NO_DESCRIPTION,
    ),
    "ONNX: half a size": (
        "m.onnx",
        "onnx",
        redescribed_onnx(description(image_size=8.5).to_json()),
        NO_DESCRIPTION,
    ),
    "ONNX: another input": ("m.onnx", "onnx", other_input, "takes in pictures instead of images"),
    "ONNX: two inputs": ("m.onnx", "onnx", two_inputs, "takes in images, more instead of images"),
    "TorchScript: empty": ("m.ts", "ts", lambda file, good: file.touch(), "cannot be loaded"),
    "TorchScript: truncated": ("m.ts", "ts", cut, "cannot be loaded"),
    "TorchScript: corrupted": ("m.ts", "ts", flipped, "cannot be loaded"),
    "TorchScript: ONNX": ("m.ts", "onnx", copied, "cannot be loaded"),
    "TorchScript: undescribed": ("m.ts", "ts", undescribed_torchscript, NO_DESCRIPTION),
    "TorchScript: a zip": ("m.ts", "ts", zip_of_text, "cannot be loaded"),
    "TorchScript: a zip bomb": ("m.ts", "ts", bomb_of_a_description, NO_DESCRIPTION),
    "OpenVINO: no weights": ("m.xml", "xml", copied, "m.bin is missing"),
    "OpenVINO: weights cut": (
        "m.xml",
        "xml",
        with_its_weights(lambda x: x[: len(x) // 2]),
        "cannot be loaded",
    ),
    "OpenVINO: undescribed": ("m.xml", "xml", undescribed_openvino, NO_DESCRIPTION),
    "OpenVINO: a page": (
        "m.xml",
        "xml",
        lambda file, good: [with_its_weights(bytes)(file, good), file.write_text("<html/>")],
        "no OpenVINO model",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, exported: dict[str, Path], photo: Path, run: Run, tmp_path: Path) -> None:
    file, kind, spoil, words = MODELS[name]
    spoil(tmp_path / file, exported[kind])
    before = state(tmp_path)
    status, lines, errors = run(tmp_path / file, photo)
    assert (status, lines) == (2, [])
    assert words in errors
    assert "Traceback" not in errors
    assert str((tmp_path / file).with_suffix("")) in errors
    assert state(tmp_path) == before


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]),
    kind=st.sampled_from(["PNG", "TIFF", "GIF", "JPEG", "WEBP", "BMP"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    size=st.integers(1, 24),
    kept=st.floats(0, 1),
    spoilt=st.integers(0, 2**16),
)
def test_any_image_becomes_a_square_or_is_refused(
    mode: str,
    kind: str,
    width: int,
    height: int,
    size: int,
    kept: float,
    spoilt: int,
    tmp_path: Path,
) -> None:
    path = tmp_path / "image"
    noise = np.random.default_rng(spoilt).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    try:
        image.save(path, format=kind)
    except (OSError, ValueError):  # some formats do not have every mode
        image.convert("RGB").save(path, format=kind)
    square = read_image(path, size)
    assert (square.mode, square.size) == ("RGB", (size, size))
    content = bytearray(path.read_bytes())
    content[spoilt % len(content)] ^= 1 + spoilt % 255
    path.write_bytes(content[: round(kept * len(content))])
    with contextlib.suppress(UserError):
        square = read_image(path, size)
        assert (square.mode, square.size) == ("RGB", (size, size))


def test_the_classes_of_the_good_files_are_those_of_the_description(
    exported: dict[str, Path], photo: Path, run: Run
) -> None:
    """The files of the tables above work before they are damaged."""
    for kind in ("ts", "onnx", "xml"):
        status, ((_, *fields),), _ = run(exported[kind], photo)
        assert status == 0
        assert set(fields[::2]) <= set(CLASSES)
