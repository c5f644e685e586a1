"""`lightning_qat.to_onnx` exports any network as ONNX, with the names of its arguments."""

import copy
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import UserError, to_onnx
from lightning_qat.quantization.convert import convert
from tests.deployment.artifacts import calibrated
from tests.quantization.networks import SmallNet, images


def run(proto: Any, **inputs: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"both": self.left(left) + self.right(right), "one": self.left(left)}


class Around(nn.Module):
    """A user's pre-processing around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels.float() / 255)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    return calibrated(SmallNet(), images()[0])


@pytest.mark.parametrize("kind", ["quantized", "int8"])
def test_a_network_needs_no_example_where_one_was_recorded(kind: str, net: Any) -> None:
    x = images(count=5, seed=1)[0]
    model = net if kind == "quantized" else convert(net, "x86")
    found = run(to_onnx(model), x=x)
    with torch.no_grad():
        assert torch.equal(found["output"], net(x))


def test_a_module_around_an_int8_model_takes_what_its_forward_takes(net: Any) -> None:
    pixels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    model = Around(convert(net, "x86"))
    before = copy.copy(model._modules)
    proto = to_onnx(model, pixels[:2])
    assert model._modules == before
    assert "QuantizeLinear" in {node.op_type for node in proto.graph.node}
    with torch.no_grad():
        expected = Around(net)(pixels)
    assert torch.allclose(run(proto, pixels=pixels)["output"], expected, atol=1e-6)
    with pytest.raises(UserError, match="does not know what Around takes"):
        to_onnx(model)


def test_inputs_have_the_names_of_arguments_and_outputs_those_of_keys() -> None:
    torch.manual_seed(0)
    net, left, right = TwoInputs().train(), torch.randn(6, 4), torch.randn(6, 5)
    proto = to_onnx(net, left=left[:2], right=right[:2])
    assert net.training
    found = run(proto, left=left, right=right)
    expected = net(left, right)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x)


def test_height_and_width_are_free_where_that_is_asked_for(net: Any) -> None:
    proto = to_onnx(net, dynamic="size")
    x = torch.rand(3, 3, 12, 16)
    with torch.no_grad():
        assert torch.allclose(run(proto, x=x)["output"], net(x), atol=1e-6)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.rand(2, 4, 8, 8),), {}),
        ((torch.rand(2, 3, 8, 8), 1), {}),
        ((), {"images": torch.rand(2, 3, 8, 8)}),
    ],
    ids=["channels", "too many", "name"],
)
def test_inputs_that_do_not_fit_are_refused(args: Any, kwargs: Any, net: Any) -> None:
    with pytest.raises(UserError, match="SmallNet cannot be run on these example inputs"):
        to_onnx(net, *args, **kwargs)
