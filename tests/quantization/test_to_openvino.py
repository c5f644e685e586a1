"""OpenVINO fuses operations, and keeps all their roundings."""

import openvino
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import to_openvino
from tests.deployment.artifacts import calibrated


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
def test_openvino_leaves_no_rounding_out(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 9, 9) * 2
    quantized = calibrated(net(), x)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(to_openvino(quantized, x[:2]), "CPU", settings)
    found = torch.from_numpy(compiled([x.numpy()])[0])
    with torch.no_grad():
        different = (found - quantized(x)).abs() > 1e-3
    assert different.double().mean() < 0.01


def test_a_linear_layer_on_tokens_is_not_reshaped() -> None:
    """With reshapes, OpenVINO refuses Hugging Face's Swin and computes a wrong SegFormer."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 8)
    model = to_openvino(calibrated(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), x), x[:2])
    products = [x for x in model.get_ops() if x.get_type_name() == "MatMul"]
    reshaped = [x.input_value(0).get_node().get_type_name() for x in products]
    assert len(products) == 2
    assert "Reshape" not in reshaped
