"""Files for other runtimes have the same integers."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.deployment.deployed import DeployedModel, PixelModel
from lightning_qat.deployment.description import KEY, PIXELS, UNIT, Description
from lightning_qat.deployment.export import ExportedFile, export
from lightning_qat.deployment.onnx_export import to_onnx
from lightning_qat.deployment.openvino_export import save_openvino
from lightning_qat.deployment.runtimes import load
from lightning_qat.quantization.onnx_export import OPSET
from tests.deployment.artifacts import calibrated
from tests.quantization.networks import SmallNet

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def describe(input: str = UNIT) -> Description:
    return Description(
        classes=["a", "b", "c", "d"], image_size=16, input=input, max_value=255,
        mean=list(MEAN), std=list(STD), stage="qat", data="random", model="small", qconfig="x86",
        engine="x86", seed=0, command="none", commit=None, date="2026-11-23",
        torch=torch.__version__, test_images=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture(scope="module")
def model(pixels: Tensor) -> DeployedModel:
    torch.manual_seed(0)
    images = DeployedModel(nn.Identity(), MEAN, STD)(pixels / 255)
    return DeployedModel(calibrated(SmallNet(), images), MEAN, STD)


@pytest.fixture(scope="module")
def exports(
    model: DeployedModel, pixels: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> list[ExportedFile]:
    folder = tmp_path_factory.mktemp("files")
    made = export(model, folder / "model", describe(), (pixels / 255)[:2], [])
    of_pixels = export(PixelModel(model, 255), folder / "pixels", describe(PIXELS), pixels[:2], [])
    return [*made.values(), *of_pixels.values()]


@pytest.fixture(scope="module")
def files(exports: list[ExportedFile]) -> Path:
    """Return the folder of model.ts, .onnx, .xml (float images) and pixels.ts, ... (raw ones)."""
    return exports[0].path.parent


@pytest.mark.parametrize("suffix", [".ts", ".onnx", ".xml"])
def test_every_runtime_gives_the_logits_of_the_trained_network(
    files: Path, suffix: str, model: DeployedModel, pixels: Tensor
) -> None:
    with torch.no_grad():
        expected = model(pixels / 255)
    found = load(files / f"model{suffix}")(pixels / 255)
    assert (found - expected).abs().max() < 1e-4  # a step of the last layer is 100 times that
    assert (found - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("suffix", [".ts", ".onnx", ".xml"])
def test_raw_pixels_give_bit_by_bit_what_normalised_floats_give(
    files: Path, suffix: str, pixels: Tensor
) -> None:
    on_floats, on_pixels = load(files / f"model{suffix}"), load(files / f"pixels{suffix}")
    assert on_pixels.description.input == PIXELS
    assert torch.equal(on_pixels(pixels), on_floats(pixels / 255))


@pytest.mark.parametrize("kind", ["model", "pixels"])
def test_onnx_runtime_gives_the_trained_network_bit_for_bit(
    files: Path, kind: str, model: DeployedModel, pixels: Tensor
) -> None:
    images = pixels if kind == "pixels" else pixels / 255
    with torch.no_grad():
        assert torch.equal(load(files / f"{kind}.onnx")(images), model(pixels / 255))


@pytest.mark.parametrize("suffix", [".ts", ".onnx", ".xml"])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_any_number_of_images_may_come(
    files: Path, suffix: str, count: int, pixels: Tensor
) -> None:
    model = load(files / f"model{suffix}", threads=1)
    images = pixels / 255
    assert torch.allclose(model(images[:count]), model(images)[:count], atol=1e-4)


def test_int8_weights_feed_every_layer_and_nothing_stands_between_integers(files: Path) -> None:
    proto = onnx.load(files / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(x.domain, x.version) for x in proto.opset_import if not x.domain] == [("", OPSET)]
    producers = {output: node for node in proto.graph.node for output in node.output}
    weights = {x.name: x for x in proto.graph.initializer}
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == 4
    for layer in layers:
        image, weight = producers[layer.input[0]], producers[layer.input[1]]
        assert weight.op_type == image.op_type == "DequantizeLinear"
        assert weights[weight.input[0]].data_type == onnx.TensorProto.INT8
        # one scale per channel
        assert len(onnx.numpy_helper.to_array(weights[weight.input[1]])) > 1
        bias = producers[layer.input[2]]  # with batch-norm folded in
        assert weights[bias.input[0]].data_type == onnx.TensorProto.INT32
    kinds = {node.op_type for node in proto.graph.node}
    assert kinds <= {
        "Sub", "Div", "QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "Add", "ReduceMean",
        "Reshape", "Gemm",
    }  # fmt: skip


def test_onnx_runtime_fuses_all_of_it(files: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(files / "model.onnx", options, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert kinds.count("QGemm") == kinds.count("QLinearAdd") == 1
    assert not {"Conv", "Gemm", "Add"} & set(kinds)


def test_openvino_still_needs_the_work_around_for_residual_sums(
    model: DeployedModel, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = to_onnx(model, (pixels / 255)[:2])
    module = "lightning_qat.deployment.openvino_export.for_openvino"
    monkeypatch.setattr(module, lambda proto: proto)
    save_openvino(proto, tmp_path / "as_it_comes.xml", describe())
    with torch.no_grad():
        expected = model(pixels / 255)
    wrong = (load(tmp_path / "as_it_comes.xml")(pixels / 255) - expected).abs().max()
    assert wrong > 1e-3, "OpenVINO rounds by itself now: drop the work-around"


def test_the_description_can_be_read_without_this_package(files: Path) -> None:
    session = onnxruntime.InferenceSession(files / "model.onnx")
    said = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    extra = {f"{KEY}.json": ""}
    torch.jit.load(files / "model.ts", _extra_files=extra)
    assert said == json.loads(extra[f"{KEY}.json"])
    assert said["classes"] == ["a", "b", "c", "d"]


def test_lines_that_load_a_file_do_load_it(
    exports: list[ExportedFile], files: Path, pixels: Tensor, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(files)
    images = DeployedModel(nn.Identity(), MEAN, STD)(pixels / 255)
    mobile = DeployedModel(calibrated(SmallNet(), images, "qnnpack"), MEAN, STD)
    said = dataclasses.replace(describe(), engine="qnnpack")
    in_mobile = export(mobile, files / "mobile", said, pixels / 255, [], onnx=False)
    for file in [*exports, *in_mobile.values()]:
        monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
        assert "lightning_qat" not in file.how_to_load
        exec(file.how_to_load, {})
        assert "[" in capsys.readouterr().out
        assert torch.backends.quantized.engine == file.description.engine


WRITTEN = ["model.ts", "model.onnx", "model.bin", "model.xml"]


@pytest.mark.parametrize("done", range(4), ids=WRITTEN)
def test_a_failed_export_leaves_what_it_has_not_written_but_no_xml_beside_other_weights(
    done: int, files: Path, model: DeployedModel, pixels: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = shutil.copytree(files, tmp_path / "files")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, room = Path.replace, iter(WRITTEN[:done])

    def until_full(path: Path, target: Path) -> None:
        if next(room, None) is None:
            raise OSError("no space left on device")
        replace(path, target)

    monkeypatch.setattr(Path, "replace", until_full)
    proto = onnx.load(files / "model.onnx")  # a new export would take seconds
    monkeypatch.setattr("lightning_qat.deployment.export.from_program", lambda *args: proto)
    said = dataclasses.replace(describe(), seed=1)
    with pytest.raises(OSError, match="no space left"):
        export(model, folder / "model", said, (pixels / 255)[:2], [])
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys() - ({"model.xml"} if done > 1 else set())
    changed = {name for name, data in after.items() if data != before[name]}
    assert changed == {*WRITTEN[:done]} - {"model.bin"}  # of the same weights


def test_a_format_that_cannot_be_made_does_not_cost_the_others(
    model: DeployedModel, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise NotImplementedError("no such layer in ONNX")

    monkeypatch.setattr("lightning_qat.deployment.export.from_program", fail)
    failures: list[str] = []
    files = export(model, tmp_path / "model", describe(), (pixels / 255)[:2], failures)
    assert list(files) == ["torchscript"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.ts"]
    assert failures == [
        "model.onnx could not be made, and so no OpenVINO file: no such layer in ONNX"
    ]
