"""Loaded files give equal results, or the message says what is wrong, why, and what to do."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.deployment.deployed import save_torchscript
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.deployment.runtimes import load
from lightning_qat.errors import UserError
from tests.deployment.artifacts import FORMATS, description


def copied(file: Path, folder: Path) -> Path:
    """Return a copy that may be damaged, with the files that belong to it."""
    for path in file.parent.glob(f"{file.stem}.*"):
        shutil.copy(path, folder)
    return folder / file.name


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_format_gives_the_same_logits(
    kind: str, layout: torch.memory_format, exported: dict[str, Path]
) -> None:
    levels = torch.randint(17, (16, 3, 8, 8), dtype=torch.uint8).to(memory_format=layout)
    other = "onnx" if kind == "ts" else "ts"
    expected = load(exported[other])(levels.contiguous() / 16)
    assert expected.std() > 0.01
    assert torch.allclose(load(exported[kind])(levels / 16), expected, atol=1e-6)
    assert torch.allclose(load(exported[f"pixels-{kind}"])(levels), expected, atol=1e-6)
    assert load(exported[kind]).description == description()


class UnlikeSum(nn.Module):
    """A sum that QNNPACK cannot compute, because of its scales."""

    def forward(self, x: Tensor) -> Tensor:
        large = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
        small = torch.quantize_per_tensor(x, 1e-5, 0, torch.quint8)
        return torch.ops.quantized.add(large, small, 1.0, 0).dequantize()


def test_a_torchscript_file_is_measured_in_the_engine_that_it_runs_in(tmp_path: Path) -> None:
    scripted, x = torch.jit.script(UnlikeSum()), torch.ones(1, 3, 8, 8)
    for engine in ("x86", "qnnpack"):
        save_torchscript(scripted, tmp_path / f"{engine}.ts", description(engine=engine))
    assert torch.equal(load(tmp_path / "x86.ts")(x), x)
    with pytest.raises(RuntimeError, match="failed to create QNNPACK Add"):
        load(tmp_path / "qnnpack.ts")(x)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", ["empty", "text", "half", "end"])
def test_a_damaged_file_is_named(
    kind: str,
    damage: str,
    exported: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = copied(exported[kind], tmp_path)
    whole = file.read_bytes()
    half = whole[: len(whole) // 2]
    file.write_bytes({"empty": b"", "text": b"text", "half": half, "end": whole[:-10]}[damage])
    with pytest.raises(UserError, match=rf"{file} cannot be loaded: .*export it again") as caught:
        load(file)
    assert "Exception from" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_an_openvino_file_without_its_weights_is_named(
    damage: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    file = copied(exported["xml"], tmp_path)
    weights = file.with_suffix(".bin")
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[: 900 if damage == "half" else 0])
    words = "is missing.*keep the two together" if damage == "missing" else "weights.*bin file"
    with pytest.raises(UserError, match=words):
        load(file)


RUBBISH = {
    "none": None, "no_json": "{", "number": "5", "empty": "{}",
    "classes": description(classes=[]).to_json(), "class": description(classes=[1]).to_json(),
    "size": description(image_size=0).to_json(), "word": description(image_size="8").to_json(),
    "input": description(input="sound").to_json(), "max": description(max_value=0).to_json(),
}  # fmt: skip


@pytest.mark.parametrize("what", RUBBISH)
def test_a_file_without_our_description_is_named(
    what: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    proto = onnx.load(exported["onnx"])
    text = RUBBISH[what]
    onnx.helper.set_model_props(proto, {} if text is None else {KEY: text})
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=rf"{tmp_path}/other\.onnx has no description by lightning"):
        load(tmp_path / "other.onnx")


def test_torch_files_of_another_kind_are_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "other.ts"))
    torch.save({"state_dict": {}}, tmp_path / "checkpoint.ts")
    for name in ("other.ts", "checkpoint.ts"):
        assert zipfile.is_zipfile(tmp_path / name)
        with pytest.raises(UserError, match=rf"{tmp_path / name} has no description by lightning"):
            load(tmp_path / name)


def test_a_graph_with_another_input_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    proto = onnx.load(exported["onnx"])
    for node in proto.graph.node:
        node.input[:] = ["x" if name == "images" else name for name in node.input]
    proto.graph.input[0].name = "x"
    onnx.save(proto, tmp_path / "renamed.onnx")
    with pytest.raises(UserError, match=r"renamed\.onnx takes in x instead of images"):
        load(tmp_path / "renamed.onnx")


def test_what_a_later_version_adds_to_the_description_is_passed_over() -> None:
    fields: dict[str, Any] = json.loads(description().to_json())
    assert Description.from_json(json.dumps({**fields, "new": 1})) == description()


@pytest.mark.parametrize("name", ["last.ckpt", "model_int8.bin", "folder", "cat.png"])
def test_other_files_are_refused_with_what_to_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} is no exported model: .*\.ts, \.onnx, \.xml"):
        load(tmp_path / name)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"none\.{kind} does not exist"):
        load(tmp_path / f"none.{kind}")


def test_without_openvino_its_files_name_the_extra(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'lightning_qat\[openvino\]'"):
        load(exported["xml"])


SIGNALLED = """
import os, signal, sys, torch
from pathlib import Path
from lightning_qat.deployment.runtimes import OpenVino

def used():
    model = OpenVino(Path(sys.argv[1]))
    model(torch.rand(1, 3, 8, 8))
    return model

first, second = used(), used()
del first
del second
signal.signal(signal.SIGTERM, lambda *args: sys.exit(7))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_also_after_openvino_was_used(exported: dict[str, Path]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SIGNALLED, str(exported["xml"])]
    assert subprocess.run(command).returncode == 7
