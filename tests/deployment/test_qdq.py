"""The INT8 network in floats, as ONNX has it: the same integers."""

from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq

from lightning_qat.deployment.onnx_export import to_onnx
from lightning_qat.deployment.qdq import qdq
from lightning_qat.quantization.bias import round_biases
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.prepare import prepare_qat
from tests.quantization.test_layers import FUSED, Functional, chain, trained


class OneCallClamped(nn.Module):
    """A layer that is called twice, with ReLU behind the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


CASES: dict[str, Any] = FUSED | {
    "functions": (Functional, (8, 3, 9, 9), 0),
    "sigmoid": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)),
        (8, 3, 9, 9),
        2,
    ),
    "two clamps": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.Hardtanh(-0.5, 0.5), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        (8, 3, 9, 9),
        2,
    ),
    "clamped between two integers": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.Hardtanh(-0.3, 0.3), nn.Conv2d(4, 4, 3)),
        (8, 3, 9, 9),
        2,
    ),
    "one call of two clamped": (OneCallClamped, (8, 3, 9, 9), 1),
    "tanh": (lambda: chain(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1)), (8, 3, 9, 9), 2),
}


@pytest.mark.parametrize("qconfig", ["x86", "qnnpack"])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_gives_the_integers_of_torchs_kernel(name: str, qconfig: str) -> None:
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(shape) * 3
    prepared: Any = trained(make(), x, qconfig)
    round_biases(prepared)
    int8: Any = convert(prepared, qconfig)
    if qconfig == "qnnpack" and "3d" in name:
        with pytest.raises(NotImplementedError, match="use qconfig='x86'"):
            qdq(int8)
        return
    scales: list[Any] = [m.scale for m in prepared.modules() if isinstance(m, tq.FakeQuantizeBase)]
    step = [scale for scale in scales if scale.numel() == 1][-1]
    with torch.no_grad():
        difference = (int8(x) - qdq(int8)(x)).abs() / step
    assert difference.max() < (2.5 if (name, qconfig) == ("conv2d elu", "qnnpack") else 1.5)
    assert (difference < 0.5).double().mean() > 0.999


def test_weights_stay_int8() -> None:
    x = torch.randn(8, 3, 9, 9)
    int8 = convert(trained(chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), x), "x86")
    state = qdq(int8).state_dict()
    weight: Any = int8.get_submodule("0")
    assert torch.equal(state["0.weight.integers"], weight.weight().int_repr())
    assert state["0.weight.integers"].dtype == torch.int8


def test_channels_with_zero_points_of_their_own_become_floats_that_runtimes_can_load() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 1)
    nn.init.uniform_(conv.weight[:3], 0.5, 1)  # of one sign: torch's own fake-quantiser shifts them
    x = torch.randn(8, 3, 9, 9)
    qconfig: Any = tq.get_default_qat_qconfig("x86")
    prepared: Any = prepare_qat(chain(conv), qconfig, "x86")
    prepared(x)
    prepared.eval().apply(tq.disable_observer)
    assert prepared.get_submodule("0").weight_fake_quant.zero_point.any()
    int8 = convert(prepared, "x86")
    assert "0.weight.integers" not in qdq(int8).state_dict()
    with torch.no_grad():
        expected = int8(x)
        assert (expected - qdq(int8)(x)).abs().max() < 1e-2
    session = onnxruntime.InferenceSession(to_onnx(int8, x[:2]).SerializeToString())
    (found,) = session.run(None, {"images": x.numpy()})
    step: Any = int8.get_submodule("0").scale
    assert (expected - torch.from_numpy(found)).abs().max() < 1.5 * step


def test_a_kernel_without_such_a_form_is_named() -> None:
    x = torch.randn(8, 3, 9, 9)
    int8 = convert(trained(chain(nn.Conv2d(3, 6, 3), nn.ReLU()), x), "x86")
    int8.add_submodule("0", torch.ao.nn.quantized.PReLU(0.1, 0))
    with pytest.raises(NotImplementedError, match="PReLU"):
        qdq(int8)
