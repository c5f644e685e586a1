"""Every kind of exported file of one small network, as after a training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.deployment.deployed import DeployedModel, PixelModel
from lightning_qat.deployment.description import PIXELS, UNIT, Description
from lightning_qat.deployment.export import export as export_model
from lightning_qat.quantization.overrides import Overrides
from lightning_qat.quantization.prepare import prepare
from lightning_qat.quantization.qconfig import QConfig, named_qconfig
from tests.quantization.networks import SmallNet

CLASSES = ["cat", "dog", "[red]fox[/red]", "émeu"]
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
FORMATS = ["ts", "onnx", "xml"]


def description(**changes: Any) -> Description:
    """Describe `SmallNet`, trained on images like `data=digits`: 8 x 8, pixels from 0 to 16."""
    fields: dict[str, Any] = {
        "classes": CLASSES, "image_size": 8, "input": UNIT, "max_value": 16, "mean": MEAN,
        "std": STD, "stage": "qat", "data": "digits", "model": "small", "qconfig": "x86",
        "engine": "x86", "seed": 0, "command": "python train.py", "commit": None,
        "date": "2026-11-23", "torch": torch.__version__, "test_images": 4,
    }  # fmt: skip
    return Description(**(fields | changes))


@torch.no_grad()
def calibrated(
    net: nn.Module,
    x: Tensor,
    qconfig: str | QConfig = "x86",
    overrides: dict[Any, Any] | None = None,
) -> Any:
    """Quantize `net` with ranges and batch-norm statistics from `x`, and return it."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    net.train()(x)
    scheme = named_qconfig(qconfig) if isinstance(qconfig, str) else qconfig
    schemes = Overrides(scheme, overrides or {}, None)
    quantization = prepare(net.eval(), (x[:2],), {}, schemes.of(net))
    quantization.example = (x[:2],), {}
    quantization.observe(True)
    net(x)
    quantization.observe(False)
    quantization.is_ready = True
    return net


def export(folder: Path) -> dict[str, Path]:
    """Return files by format, and by `pixels-` and format for uint8 pixels."""
    torch.manual_seed(0)
    levels = torch.randint(17, (64, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    net = calibrated(SmallNet(), (levels / 16 * torch.rand(64, 3, 1, 1) - mean) / std)
    images = torch.rand(64, 1, 8, 8).expand(-1, 3, -1, -1) * torch.rand(64, 1, 1, 1)
    with torch.no_grad():  # grey images of all brightnesses must get more than one class
        net.fc.bias -= net((images - mean) / std).mean(0)
    deployed = DeployedModel(net, MEAN, STD)
    failures: list[str] = []
    files = export_model(deployed, folder / "model", description(), levels[:2] / 16, failures)
    pixels = export_model(
        PixelModel(deployed, 16), folder / "pixels", description(input=PIXELS), levels[:2], failures
    )
    assert not failures
    suffixes = {"torchscript": "ts", "onnx": "onnx", "openvino": "xml"}
    return {suffixes[name]: file.path for name, file in files.items()} | {
        f"pixels-{suffixes[name]}": file.path for name, file in pixels.items()
    }
