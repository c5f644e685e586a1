"""OpenVINO fuses operations, and none of their roundings gets lost."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.deployment.onnx_export import to_onnx
from lightning_qat.deployment.openvino_export import save_openvino
from lightning_qat.deployment.runtimes import load
from tests.deployment.artifacts import calibrated, description


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x) - self.other(x))


class Clamped(Difference):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.clamp(self.one(x) * 1.5, -0.3, 0.4))


class MeanOfPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1, 2)).mean(1)


@pytest.mark.parametrize("net", [Difference, Clamped, MeanOfPositions])
def test_openvino_leaves_no_rounding_out(net: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 9, 9) * 2
    quantized = calibrated(net(), x)
    save_openvino(to_onnx(quantized, x[:2]), tmp_path / "net.xml", description())
    with torch.no_grad():
        different = (load(tmp_path / "net.xml")(x) - quantized(x)).abs() > 1e-3
    assert different.double().mean() < 0.01
