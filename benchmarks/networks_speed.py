"""Compare the speed of this project's INT8 files with FP32, NNCF and ONNX Runtime's quantization.

    python benchmarks/networks_speed.py                # needs timm and the extra `peers`
    python benchmarks/networks_speed.py resnet18       # this network only

1 image of 224 x 224, 1 thread, random weights. All models of a network take turns in one run, and
start from the same FP32 graph. Each tool calibrates on the same noise, because speed does not
depend on the images. Writes benchmarks/results/networks_speed.json and .md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from networks import float_network
from record import RESULTS, origin, origin_in_words, write
from torch import Tensor

from lightning_qat import to_onnx
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.quantization.prepare import prepare
from lightning_qat.quantization.qconfig import QCONFIGS
from lightning_qat.quantization.to_openvino import for_openvino

NETWORKS = (
    "resnet18", "mobilenetv3_small_100", "efficientnet_b0", "tf_efficientnet_lite0",
    "vit_tiny_patch16_224", "convnext_atto",
)  # fmt: skip
SIZE = 224
IMAGES = 8  # for calibration
Model = Callable[[Tensor], Any]


def in_onnx_runtime(path: Path) -> Model:
    """Load a file into ONNX Runtime with its default optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


def in_openvino(model: Any) -> Model:
    """Compile an OpenVINO model, or an ONNX file, for one image."""
    import openvino

    core = openvino.Core()
    model = core.read_model(model) if isinstance(model, Path) else model
    model.reshape([1, 3, SIZE, SIZE])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> np.ndarray:
        request.infer([images.numpy()], share_inputs=True)
        return request.get_output_tensor().data

    return run


def ours(net: torch.nn.Module, images: Tensor, folder: Path) -> dict[str, Model]:
    """Calibrate with the callback's own functions, and write both files."""
    quantization = prepare(net, (images[:2],), {}, lambda _: QCONFIGS["x86"])
    quantization.example = (images[:2],), {}
    quantization.observe(True)
    with torch.no_grad():
        net.eval()(images)
    quantization.observe(False)
    quantization.is_ready = True
    proto = to_onnx(net)
    onnx.save(proto, folder / "ours.onnx")
    onnx.save(for_openvino(proto), folder / "ours_openvino.onnx")
    return {
        "ours, ONNX Runtime": in_onnx_runtime(folder / "ours.onnx"),
        "ours, OpenVINO": in_openvino(folder / "ours_openvino.onnx"),
    }


def static(fp32: Path, images: Tensor, folder: Path) -> dict[str, Model]:
    """Quantize with ONNX Runtime: 8-bit, and with reduce_range, which it advises without VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(4))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            name = onnx.load(fp32).graph.input[0].name
            return None if batch is None else {name: batch.numpy()}

    ready = folder / "ready.onnx"
    quant_pre_process(fp32, ready, skip_symbolic_shape=True)
    models: dict[str, Model] = {}
    for per_channel in (True, False):
        path = folder / f"static_{per_channel}.onnx"
        quantize_static(
            ready,
            path,
            Images(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=not torch.cpu._is_vnni_supported(),
        )
        scales = "a scale a channel" if per_channel else "a scale a tensor"
        models[f"ONNX Runtime static, {scales}, ONNX Runtime"] = in_onnx_runtime(path)
        models[f"ONNX Runtime static, {scales}, OpenVINO"] = in_openvino(path)
    return models


def nncf_model(fp32: Path, images: Tensor) -> dict[str, Model]:
    """Quantize with NNCF for OpenVINO. Transformers use NNCF's settings for transformers."""
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    models = {}
    for kind in (None, nncf.ModelType.TRANSFORMER):
        model = openvino.Core().read_model(fp32)
        model.reshape([1, 3, SIZE, SIZE])
        data = nncf.Dataset(images.split(1), lambda image: image.numpy())
        quantized = nncf.quantize(model, data, subset_size=len(images), model_type=kind)
        models[f"NNCF{' for transformers' if kind else ''}, OpenVINO"] = in_openvino(quantized)
    return models


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Return the latency of each model of a network, and the tools that failed."""
    net, _ = float_network(lambda: _network(name))
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fp32 = folder / "fp32.onnx"
        onnx.save(to_onnx(net.eval(), images[:2]), fp32)
        models = {"FP32, ONNX Runtime": in_onnx_runtime(fp32), "FP32, OpenVINO": in_openvino(fp32)}
        for make in (
            lambda: ours(net, images, folder),
            lambda: static(fp32, images, folder),
            lambda: nncf_model(fp32, images),
        ):
            try:
                models |= make()
            except Exception as error:  # a failed tool is a row of the table
                failed[make.__code__.co_names[0]] = f"{type(error).__name__}: {error}"[:300]
        outputs = {key: _differences(model, images) for key, model in models.items()}
        expected = outputs["FP32, ONNX Runtime"]
        distance = {
            key: float(np.linalg.norm(x - expected) / np.linalg.norm(expected))
            for key, x in outputs.items()
        }
        latency = measure_latency(models, images[:1], rounds=1000, seconds=seconds)
    return {"latency_ms": latency, "distance": distance, "failed": failed}


def _differences(model: Model, images: Tensor) -> np.ndarray:
    """Return the outputs for single images, less their mean: a constant model gives zeros."""
    found = np.concatenate([np.array(model(image)) for image in images.split(1)])
    return found - found.mean(0)


def _network(name: str) -> Any:
    net = timm.create_model(name, pretrained=False, num_classes=1000)
    for module in net.modules():  # timm's residual networks begin with zeros, which tools fold away
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return net, ((torch.randn(2, 3, SIZE, SIZE),), {})


def fastest(row: dict[str, Any], prefix: str) -> tuple[str, float]:
    """Return the name and the median of the fastest model with this prefix."""
    found = {name: x["p50"] for name, x in row["latency_ms"].items() if name.startswith(prefix)}
    best = min(found, key=lambda name: found[name], default="")
    return best, found.get(best, float("nan"))


def table(result: dict[str, Any]) -> str:
    """Return the result in Markdown: ratios of medians."""
    lines = [
        "# Speed of networks at 224 x 224",
        "",
        "| network | ours, fastest | FP32 / ours | fastest peer | peer / ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["networks"].items():
        file, own = fastest(row, "ours")
        _, fp32 = fastest(row, "FP32")
        peer, other = min(
            (fastest(row, prefix) for prefix in ("NNCF", "ONNX Runtime static")),
            key=lambda x: x[1],
        )
        lines.append(
            f"| {name} | {file.rpartition(', ')[2]} | {fp32 / own:.2f} | {peer} "
            f"| {other / own:.2f} |"
        )
    lines += ["", "All models, median and p95 in ms of one run:", ""]
    names = list(dict.fromkeys(x for r in result["networks"].values() for x in r["latency_ms"]))
    lines += [f"| network | {' | '.join(names)} |", f"| --- {'| --- ' * len(names)}|"]
    for name, row in result["networks"].items():
        cells = (row["latency_ms"].get(x) for x in names)
        values = [f"{x['p50']:.2f} ({x['p95']:.2f})" if x else "" for x in cells]
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines.append("")
    for name, row in result["networks"].items():
        lines += [f"- {name}: {tool} failed, {why}" for tool, why in row["failed"].items()]
    lines.append(
        "1 image, 1 thread, random weights, median of calls in turns. *FP32*: the faster of ONNX "
        "Runtime and OpenVINO. A ratio above 1: ours is faster. "
        f"{origin_in_words(result)}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the named networks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=40, help="for each network")
    arguments = parser.parse_args()
    file = RESULTS / "networks_speed.json"
    rows = json.loads(file.read_text())["networks"] if file.exists() else {}
    for name in arguments.names or NETWORKS:
        rows[name] = measure(name, arguments.seconds)
        result = origin() | {"networks": rows}
        write(result, table(result), file.with_suffix(""))


if __name__ == "__main__":
    main()
