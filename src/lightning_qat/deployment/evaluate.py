"""Everything that is measured of a run's networks."""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.data.image_datamodule import ImageDataModule
from lightning_qat.deployment.accuracy import accuracy, agreement, predict_test_set
from lightning_qat.deployment.deployed import DeployedModel, save_torchscript, torchscript
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.quantization.convert import quantised_engine

Runtime = Any  # callable: images -> logits


def evaluate(
    networks: dict[str, nn.Module], datamodule: ImageDataModule, folder: Path
) -> dict[str, Any]:
    """Export to ``folder`` and measure: accuracy, agreement, sizes, latency.

    INT8 accuracy is that of the exported file, loaded back.

    Args:
        networks: ``fp32`` and, where there was quantisation, ``fake_quant`` and ``int8``.
        datamodule: set up already.
        folder: gets ``model_int8.ts``.
    """
    models = {
        name: DeployedModel(net, datamodule.mean, datamodule.std) for name, net in networks.items()
    }
    fp32_file = io.BytesIO()
    fp32_torchscript = torchscript(models["fp32"])
    torch.jit.save(fp32_torchscript, fp32_file)
    size_bytes = {"fp32": fp32_file.getbuffer().nbytes}
    runtimes: dict[str, Runtime] = {
        "fp32_eager": models["fp32"],
        "fp32_torchscript": fp32_torchscript,
    }
    tested: dict[str, Runtime] = {"fp32": models["fp32"]}
    if "int8" in models:
        path = folder / "model_int8.ts"
        size_bytes["int8"] = save_torchscript(torchscript(models["int8"]), path)
        with quantised_engine(str(networks["int8"].engine)):
            # one copy a use: oneDNN's convolutions are fast only for the batch size they meet first
            for_testing, for_timing = torch.jit.load(str(path)), torch.jit.load(str(path))
        tested |= {"fake_quant": models["fake_quant"], "int8": for_testing}
        runtimes |= {"int8_eager": models["int8"], "int8_torchscript": for_timing}

    logits, labels = predict_test_set(tested, datamodule)
    figures: dict[str, Any] = {
        "accuracy": {name: accuracy(x, labels) for name, x in logits.items()},
        "test_images": len(labels),
        "size_bytes": size_bytes,
    }
    if "int8" in logits:
        figures["agreement"] = {
            "int8_vs_fake_quant": agreement(logits["int8"], logits["fake_quant"])
        }
    if torch.cuda.is_available():
        runtimes["fp32_cuda"] = copy.deepcopy(models["fp32"]).cuda()
    figures["latency_ms"] = measure_latency(runtimes, _one_image(datamodule))
    return figures


def _one_image(datamodule: ImageDataModule) -> Tensor:
    images, _ = datamodule.on_after_batch_transfer(next(iter(datamodule.test_dataloader())), 0)
    return images[:1].contiguous()  # the layout in which a user's image comes
