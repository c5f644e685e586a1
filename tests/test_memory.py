"""Training needs no more memory than its budget. The bytes are counted without a GPU."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.data import DigitsDataModule
from lightning_qat.deployment.deployed import DeployedModel
from lightning_qat.network import resnet18
from lightning_qat.quantization import QCONFIGS
from lightning_qat.quantization.convert import convert
from lightning_qat.quantization.network import Quantization
from lightning_qat.quantization.prepare import prepare
from lightning_qat.quantization.torch_model import torch_script
from tests.conftest import GIVES_BACK
from tests.long_run import look


def observing(net: nn.Module) -> Quantization:
    """Fake-quantize ``net`` as in a training step."""
    images = torch.rand(2, 3, 32, 32)
    quantization = prepare(net, (images,), {}, lambda _: QCONFIGS["x86"])
    quantization.example = (images,), {}
    quantization.observe(True)
    return quantization


def kept_for_backward(net: nn.Module, batch_size: int) -> int:
    """Return the bytes of the tensors that the backward pass of one step needs, without weights."""
    weights = {x.untyped_storage().data_ptr() for x in net.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # keep them, or an address would be used again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    images = torch.rand(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        F.cross_entropy(net(images), torch.zeros(batch_size, dtype=torch.int64))
    return sum(found.values())


@pytest.mark.parametrize(("stage", "budget"), [("fp32", 2.5e9), ("qat", 4.5e9)])
def test_512_images_a_step_fit_in_8_gb(stage: str, budget: float) -> None:
    net: Any = resnet18(10).to(memory_format=torch.channels_last).train()
    if stage == "qat":
        observing(net)
    few, more = kept_for_backward(net, 2), kept_for_backward(net, 4)
    of_an_image = (more - few) / 2
    at_512 = few + 510 * of_an_image
    # Weights, gradients and momentum take 0.13 GB. The rest is temporary memory of kernels.
    assert at_512 < budget


def test_batches_are_cut_from_the_one_copy_of_the_images() -> None:
    datamodule = DigitsDataModule()
    datamodule.setup("fit")
    loaders: Any = (datamodule.train_dataloader(), datamodule.val_dataloader())
    storages = {loader.dataset.data.images.untyped_storage().data_ptr() for loader in loaders}
    assert len(storages) == 1


def grown_by_exports(stage: str) -> float:
    """Return the memory growth of four exports, as a multiple of the exported weights."""

    def export() -> int:
        net: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4096))
        if stage == "int8":
            quantization = observing(net)
            net(torch.rand(2, 3, 32, 32))
            quantization.observe(False)
            quantization.is_ready = True
            net = convert(net.eval(), "x86")
        torch_script(DeployedModel(net, [0.5] * 3, [0.25] * 3))(torch.rand(1, 3, 32, 32))
        return look()["bytes"]

    export()
    before = export()
    after = [export() for _ in range(4)][-1]
    return round((after - before) / (3 * 32 * 32 * 4096 * (4 if stage == "fp32" else 1)), 2)


@pytest.mark.parametrize("stage", ["fp32", "int8"])
def test_an_exported_network_is_not_kept(stage: str) -> None:
    command = f"from tests.test_memory import grown_by_exports; print(grown_by_exports({stage!r}))"
    said = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, env=os.environ | GIVES_BACK
    )
    assert float(said.stdout) < 0.5, said.stderr


def test_a_run_is_not_charged_for_the_memory_of_what_started_it() -> None:
    held = bytearray(1_500_000_000)
    command = "import lightning_qat.report.environment as x; print(x.peak_memory()['rss'])"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert 1e8 < int(said.stdout) < len(held)
