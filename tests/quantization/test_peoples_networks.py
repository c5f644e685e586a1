"""Networks of many styles can be trained, and keep their trained integers after conversion."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QuantizationAwareTraining
from tests.quantization.comparisons import (
    apart,
    in_onnx_runtime,
    int8_apart,
    integer_layers,
    tensors,
)
from tests.quantization.networks import images, trainer_with
from tests.quantization.peoples_networks import NETWORKS, KeywordsOnly, Siamese


def called(net: nn.Module, x: Tensor, labels: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``net`` for a batch of images."""
    if isinstance(net, KeywordsOnly):
        return (), {"pixel_values": x, "labels": labels}
    if isinstance(net, Siamese):
        return (x, x.flip(-1), x.flatten(1)[:, :5]), {}
    return (x,), {}


class Trains(pl.LightningModule):
    """Train any network, towards small outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        args, kwargs = called(self.net, *batch)
        output = self.net(*args, **kwargs)
        values = tensors(vars(output) if hasattr(output, "__dataclass_fields__") else output)
        return torch.stack([x.pow(2).mean() for x in values]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def two_steps() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(32)), batch_size=16)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_and_becomes_integers(name: str, tmp_path: Any) -> None:
    make, layers = NETWORKS[name]
    module = Trains(make())
    before = {key: x.detach().clone() for key, x in module.net.named_parameters()}
    callback = QuantizationAwareTraining()
    trainer_with(callback, folder=tmp_path).fit(module, two_steps())
    after = dict(module.net.named_parameters())
    assert list(after) == list(before)
    weights = [key for key in before if before[key].ndim > 1]
    assert not [key for key in weights if torch.equal(before[key], after[key])]
    assert callback.in_float == {}
    assert len(integer_layers(callback.int8_model)) == layers
    args, kwargs = called(module.net, *images(24, seed=5))
    assert int8_apart(callback, *args, **kwargs) < 1e-5
    with torch.no_grad():
        expected = callback.networks["fake_quant"](*args, **kwargs)
    assert apart(expected, in_onnx_runtime(callback.networks["fake_quant"], *args, **kwargs)) < 1e-5
