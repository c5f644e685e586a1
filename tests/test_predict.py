"""`python -m lightning_qat.predict MODEL IMAGE...` gives right answers, or a helpful message."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console

from lightning_qat import predict
from lightning_qat.data import FolderDataModule
from lightning_qat.deployment.description import KEY, PIXELS
from lightning_qat.deployment.runtimes import load
from tests.deployment.artifacts import CLASSES, FORMATS, description

KINDS = [*FORMATS, *(f"pixels-{kind}" for kind in FORMATS)]

Run = Callable[..., tuple[int, list[list[str]], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run it in this process; return exit status, fields of each line, and stderr."""

    def run(*arguments: str | Path) -> tuple[int, list[list[str]], str]:
        try:
            status: Any = predict.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        printed, errors = capsys.readouterr()
        return status, [line.split("\t") for line in printed.splitlines()], errors

    return run


@pytest.fixture
def digits(tmp_path: Path) -> tuple[list[Path], torch.Tensor]:
    """Return grey PNG files of 8 x 8 images with levels from 0 to 16, and the levels, uint8."""
    levels = torch.randint(17, (12, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    levels[::3] //= 4  # dark images and bright images
    levels[1::3] = 16 - levels[1::3] // 4
    paths = [tmp_path / f"{number}.png" for number in range(len(levels))]
    for path, image in zip(paths, levels, strict=True):
        Image.fromarray((image.double() / 16 * 255).round().byte().numpy()).save(path)
    return paths, levels.unsqueeze(1).repeat(1, 3, 1, 1)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_test_image_gets_the_logits_of_the_test_image(
    kind: str, exported: dict[str, Path], digits: tuple[list[Path], torch.Tensor], run: Run
) -> None:
    paths, levels = digits
    model = load(exported[kind])
    inputs = levels if model.description.input == PIXELS else levels.float() / 16
    for path, image in zip(paths, inputs, strict=True):
        assert torch.equal(predict.load_image(path, model.description), image.unsqueeze(0))
    expected = model(inputs).softmax(1)
    assert len(set(expected.argmax(1).tolist())) > 1
    status, lines, _ = run(exported[kind], *paths)
    assert status == 0
    for path, (shown, *fields), shares in zip(paths, lines, expected, strict=True):
        ranking = shares.argsort(descending=True)[:3].tolist()
        assert shown == str(path)
        assert fields[::2] == [CLASSES[i] for i in ranking]
        assert [float(x) for x in fields[1::2]] == pytest.approx(
            shares[ranking].tolist(), abs=5.1e-5
        )


def test_images_are_prepared_as_the_folder_data_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/a/0.png", "test/a/0.png", "train/b/0.png", "test/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        pixels = rng.integers(0, 256, (37, 61, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    datamodule = FolderDataModule(tmp_path, image_size=16)
    datamodule.setup("test")
    images, _ = datamodule.on_after_batch_transfer(next(iter(datamodule.test_dataloader())), 0)
    for image, name in zip(images, ("test/a/0.png", "test/b/0.png"), strict=True):
        same = predict.load_image(tmp_path / name, description(image_size=16, max_value=255))
        assert torch.equal(image, same[0])


def test_the_good_images_are_classified_and_the_bad_ones_named(
    exported: dict[str, Path], photo: Path, run: Run
) -> None:
    bad = photo.with_name("bad.png")
    bad.write_bytes(photo.read_bytes()[:1000])
    status, lines, errors = run(exported["ts"], photo, bad, photo.parent, "none.png", photo)
    assert status == 2
    assert [line[0] for line in lines] == [str(photo)] * 2
    assert [line.split()[0] for line in errors.splitlines()] == [
        str(bad), str(photo.parent), "none.png",
    ]  # fmt: skip


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print as on a terminal of 80 columns, without colors."""
    monkeypatch.setattr(
        predict, "Console", lambda: Console(force_terminal=True, color_system=None, width=80)
    )


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    "name", ["[red]alert.png", "[b]/[/b].png", ":cat:.png", "two words.png", "日本.png", "%s.png"]
)
def test_odd_file_names_are_shown_as_they_are(
    name: str, exported: dict[str, Path], photo: Path, run: Run
) -> None:
    path = photo.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    status, ((line,),), _ = run(exported["onnx"], photo.rename(path))
    assert status == 0
    assert line.startswith(f"{path}  ")
    assert "[red]fox[/red]" in line


def test_control_characters_in_names_do_not_reach_the_terminal(
    exported: dict[str, Path], photo: Path, run: Run
) -> None:
    path = photo.rename(photo.with_name("a\tb\n\x1b[2J.png"))
    status, ((shown, *rest),), _ = run(exported["onnx"], path)
    assert (status, len(rest)) == (0, 6)
    assert shown.endswith(r"/a\tb\n\x1b[2J.png'")


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_columns(
    exported: dict[str, Path], photo: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(photo.parent)
    Path("x.png").write_bytes(photo.read_bytes())
    status, ((first,), (second,)), _ = run(exported["ts"], "photo.png", "x.png")
    assert status == 0
    assert first.startswith("photo.png  ")
    assert second == first.replace("photo.png", "x.png    ")
    assert first.count("%") == 3
    assert len(first) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.onnx", "photo.png"], "none.onnx does not exist"),
        (["photo.png", "model_int8.onnx"], "photo.png is no exported model"),
        (["last.ckpt", "photo.png"], "last.ckpt is no exported model"),
        (["none.ts"], "the following arguments are required: IMAGE"),
        ([], "the following arguments are required: MODEL, IMAGE"),
    ],
)
def test_a_wrong_model_is_named_with_the_usage(arguments: list[str], words: str, run: Run) -> None:
    status, lines, errors = run(*arguments)
    usage, message = errors.splitlines()
    assert (status, lines) == (2, [])
    assert usage == "usage: python -m lightning_qat.predict [-h] MODEL IMAGE [IMAGE ...]"
    assert words in message


@pytest.mark.parametrize("change", [{"classes": CLASSES[:3]}, {"input": PIXELS}])
def test_a_model_that_does_not_fit_its_description_is_refused(
    change: dict[str, Any], exported: dict[str, Path], photo: Path, run: Run
) -> None:
    proto = onnx.load(exported["onnx"])
    onnx.helper.set_model_props(proto, {KEY: description(**change).to_json()})
    onnx.save(proto, photo.with_name("changed.onnx"))
    status, lines, errors = run(photo.with_name("changed.onnx"), photo, photo)
    assert (status, lines) == (2, [])
    assert errors.count("the model does not fit its own description") == 1


def test_two_classes_are_enough(exported: dict[str, Path], photo: Path, run: Run) -> None:
    """A network may have fewer classes than a line shows."""
    proto = onnx.load(exported["onnx"])
    first_two = onnx.helper.make_node("Slice", ["logits_", "from", "to", "axis"], ["logits"])
    for node in proto.graph.node:
        node.output[:] = ["logits_" if name == "logits" else name for name in node.output]
    proto.graph.node.append(first_two)
    for name, value in {"from": 0, "to": 2, "axis": 1}.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array([value], np.int64), name)
        )
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.helper.set_model_props(proto, {KEY: description(classes=CLASSES[:2]).to_json()})
    onnx.save(proto, photo.with_name("two.onnx"))
    status, ((_, *fields),), _ = run(photo.with_name("two.onnx"), photo)
    assert status == 0
    assert sorted(fields[::2]) == ["cat", "dog"]
    assert float(fields[1]) + float(fields[3]) == pytest.approx(1, abs=2e-4)


def in_a_process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, env={**os.environ, **environment}
    )


def test_in_a_process_of_its_own_nothing_else_is_printed(
    exported: dict[str, Path], photo: Path
) -> None:
    names = [b"h\xc3\xa9.png", b"h\xff.png"]  # UTF-8, and a name that no encoding can print
    paths = [Path(os.fsdecode(os.fsencode(photo.parent) + b"/" + name)) for name in names]
    for path in paths:
        path.write_bytes(photo.read_bytes())
    done = in_a_process(
        "-m", "lightning_qat.predict", exported["ts"], *paths, PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    first, second = done.stdout.splitlines()
    assert rb"/h\xe9.png" in first
    assert rb"/h\udcff.png'" in second
    assert first.count(b"\t") == second.count(b"\t") == 6


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, runpy; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('lightning_qat.predict', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    *text, last = in_a_process("-c", code).stdout.decode().splitlines()
    assert last == "0 False"
    assert max(map(len, text)) < 80
