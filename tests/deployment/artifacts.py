"""Every kind of exported file of one small network, as a user finds them after training."""

from pathlib import Path
from typing import Any

import torch
from torch.ao import quantization as tq

from lightning_qat.deployment.deployed import DeployedModel, save_torchscript, torchscript
from lightning_qat.deployment.description import PIXELS, UNIT, Description
from lightning_qat.deployment.onnx_export import save_onnx, to_onnx
from lightning_qat.deployment.openvino_export import save_openvino
from lightning_qat.deployment.pixels import for_pixels
from lightning_qat.deployment.qdq import qdq
from lightning_qat.quantization.bias import round_biases
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import prepare_qat
from lightning_qat.quantization.qconfig import x86
from tests.quantization.networks import SmallNet

CLASSES = ["cat", "dog", "[red]fox[/red]", "émeu"]
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
FORMATS = ["ts", "onnx", "xml"]


def description(**changes: Any) -> Description:
    """Of `SmallNet`, trained on images like `data=digits`: 8 x 8, pixels from 0 to 16."""
    fields: dict[str, Any] = {
        "classes": CLASSES, "image_size": 8, "input": UNIT, "max_value": 16, "mean": MEAN,
        "std": STD, "stage": "qat", "data": "digits", "model": "small", "qconfig": "x86",
        "engine": "x86", "seed": 0, "command": "python train.py", "commit": None,
        "date": "2026-11-23", "torch": torch.__version__, "test_images": 4,
    }  # fmt: skip
    return Description(**(fields | changes))


def export(folder: Path) -> dict[str, Path]:
    """Files by format, and by `pixels-` and format where uint8 pixels go in."""
    torch.manual_seed(0)
    prepared = prepare_qat(SmallNet(), x86(), "x86")
    for _ in range(20):
        prepared((torch.rand(16, 3, 8, 8) * torch.rand(16, 3, 1, 1) - 0.4) / 0.25)
    round_biases(prepared.eval().apply(tq.disable_observer))
    int8 = convert(prepared, "x86")
    deployed = DeployedModel(int8, MEAN, STD)
    pixels = for_pixels(int8, 16, deployed.mean, deployed.std)
    levels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    in_float = DeployedModel(qdq(int8), MEAN, STD)
    return _save(folder, "", deployed, in_float, levels.float(), description()) | _save(
        folder, "pixels-", pixels, qdq(pixels), levels, description(input=PIXELS)
    )


def _save(
    folder: Path, prefix: str, int8: Any, in_float: Any, images: Any, described: Description
) -> dict[str, Path]:
    files = {f"{prefix}{kind}": folder / f"{prefix}model_int8.{kind}" for kind in FORMATS}
    ts, onnx, xml = files.values()
    proto = to_onnx(in_float, images)
    save_torchscript(torchscript(int8), ts, described)
    save_onnx(proto, onnx, described)
    save_openvino(proto, xml, described)
    return files
