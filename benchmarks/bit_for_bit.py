"""Compare the logits of ONNX Runtime and of the fake-quantized network on CIFAR-10's test images.

    python benchmarks/bit_for_bit.py

Each network trains some steps with fake quantization from random weights. That is enough to be
better than chance. Then both compute all 10,000 images. Writes
benchmarks/results/bit_for_bit.json and .md.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytorch_lightning as pl
import torch
import torchvision
from record import RESULTS, origin, origin_in_words, write
from torch import Tensor, nn

from lightning_qat import QuantizationAwareTraining, to_onnx
from lightning_qat.data import CIFAR10DataModule
from lightning_qat.deployment.accuracy import accuracy, agreement, identical, predict_test_set
from lightning_qat.deployment.deployed import DeployedModel
from lightning_qat.module import ImageClassifier
from lightning_qat.network import resnet18

OPTIMIZER: dict[str, Any] = {
    "learning_rate": 0.05,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "decay_all": False,
    "label_smoothing": 0.1,
}
ROOT = "~/.cache/lightning_qat/cifar10"
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": functools.partial(resnet18, stem="cifar"),
    "resnet18_imagenet_stem": functools.partial(resnet18, stem="imagenet"),
    "mobilenet_v2": torchvision.models.mobilenet_v2,
}


def runtime(proto: Any) -> Callable[[Tensor], Tensor]:
    """Return ONNX Runtime with all of its optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure(name: str, steps: int) -> dict[str, Any]:
    """Train a network, and compare the logits of all test images."""
    pl.seed_everything(0, verbose=False)
    data = CIFAR10DataModule(ROOT, batch_size=128, val_size=0)
    module = ImageClassifier(NETWORKS[name], 10, mean=data.mean, std=data.std, **OPTIMIZER)
    callback = QuantizationAwareTraining("x86")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, data)
    data.setup("test")
    deployed = {
        "fake_quant": DeployedModel(callback.networks["fake_quant"], data.mean, data.std).eval(),
        "int8": DeployedModel(callback.int8_model, data.mean, data.std).eval(),
    }
    proto = to_onnx(deployed["int8"], torch.rand(2, 3, data.image_size, data.image_size))
    logits, labels = predict_test_set({**deployed, "onnx": runtime(proto)}, data)
    expected = logits.pop("fake_quant")
    return {
        "images": len(labels),
        "accuracy": accuracy(expected, labels),
        "bit_identical": {name: identical(x, expected) for name, x in logits.items()},
        "agreement": {name: agreement(x, expected) for name, x in logits.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return the result in Markdown."""
    lines = [
        "| network | test accuracy after these steps | ONNX Runtime: logits bit-identical "
        "| torch's INT8: same class |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["networks"].items():
        same, alike = row["bit_identical"], row["agreement"]
        lines.append(
            f"| {name} | {row['accuracy']:.2%} | {same['onnx']:.2%} | {alike['int8']:.2%} |"
        )
    lines += ["", f"{result['steps']} steps of 128 images, seed 0. {origin_in_words(result)}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the named networks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []], metavar="NAME")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    result = origin() | {"steps": arguments.steps, "networks": {}}
    for name in arguments.names or NETWORKS:
        result["networks"][name] = measure(name, arguments.steps)
        write(result, table(result), RESULTS / "bit_for_bit")


if __name__ == "__main__":
    main()
