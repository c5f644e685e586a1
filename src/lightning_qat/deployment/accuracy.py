"""Top-1 accuracy, agreement and divergence, on all validation or test images."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_qat.data.image_datamodule import Batch, ImageDataModule

Model = Callable[[Tensor], Tensor]


@torch.inference_mode()
def predict(
    models: dict[str, Model], loader: DataLoader[Batch], datamodule: ImageDataModule, doing: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of every model, and the labels, over one of the data module's loaders, on the CPU.

    Args:
        models: float images in [0, 1] -> logits.
        loader: its validation or test loader.
        datamodule: makes floats of the loader's bytes.
        doing: what the progress bar says.

    Returns:
        Logits by name, float32 N x classes, and labels, int64 N.
    """
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    for batch in track(loader, description=f"{doing} on the CPU", transient=True):
        images, targets = datamodule.on_after_batch_transfer(batch, 0)
        labels.append(targets)
        for name, model in models.items():
            logits[name].append(model(images))
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)


def predict_test_set(
    models: dict[str, Model], datamodule: ImageDataModule
) -> tuple[dict[str, Tensor], Tensor]:
    """``predict`` over the test set."""
    return predict(models, datamodule.test_dataloader(), datamodule, "Testing")


def validate(models: dict[str, Model], datamodule: ImageDataModule) -> dict[str, Any]:
    """What one quantization may be preferred to another by: the test set must not decide.

    Args:
        models: ``fp32`` and, where there is one, ``int8``.
        datamodule: set up already.

    Returns:
        ``images``, their number; ``accuracy`` of each model; with an ``int8``, ``divergence``: the
        mean of KL(FP32 || INT8) between the softmax outputs, in nats. It tells apart what agrees
        on every image. Empty where nothing is validated.
    """
    loader = datamodule.val_dataloader()
    if not isinstance(loader, DataLoader):
        return {}
    logits, labels = predict(models, loader, datamodule, "Validating")
    figures: dict[str, Any] = {
        "images": len(labels),
        "accuracy": {name: accuracy(x, labels) for name, x in logits.items()},
    }
    if "int8" in logits:
        figures["divergence"] = divergence(logits["fp32"], logits["int8"])
    return figures


def divergence(logits: Tensor, others: Tensor) -> float:
    """Mean over the images of KL(softmax of `logits` || softmax of `others`), in nats."""
    log_p, log_q = (x.double().log_softmax(1) for x in (logits, others))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images, 0..1, whose highest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def agreement(logits: Tensor, others: Tensor) -> float:
    """Share of images, 0..1, that two models put into the same class, right or wrong."""
    return (logits.argmax(1) == others.argmax(1)).double().mean().item()


def identical(logits: Tensor, others: Tensor) -> float:
    """Return the share of images, 0..1, whose logits are the same bit for bit."""
    return (logits == others).all(1).double().mean().item()


# The least share of images that two runtimes put into the same class.
AGREEMENT = {
    "onnx_vs_fake_quant": 1.0,
    "int8_vs_fake_quant": 0.999,
    "onnx_vs_int8": 0.999,
    "openvino_vs_int8": 0.995,
}
ACCURACY = 0.001  # how far the accuracies of the same integers may lie apart
CHANCE = 1  # so many images may have two best classes one rounding apart, on any test set


def shortfalls(
    accuracies: dict[str, float], agreements: dict[str, float], images: int
) -> list[str]:
    """Sentences that say where runtimes differ by more than they should."""
    found = []
    for name, share in agreements.items():
        bound = AGREEMENT.get(name.replace("_uint8", ""), 1.0)
        if (1 - share) * images > max(CHANCE, (1 - bound) * images) + 1e-6:
            one, other = name.split("_vs_")
            found.append(
                f"{one} and {other} agree on {share:.2%} of the {images} test images, and should on"
                f" {bound:.2%}: {one} does not compute the same here. Deploy a file that "
                "does."
            )
    for name in accuracies:
        difference = accuracies[name] - accuracies["int8"]
        if name != "fp32" and abs(difference) * images > max(CHANCE, ACCURACY * images) + 1e-6:
            found.append(
                f"{name} is {100 * difference:+.2f} points from int8, and should be within "
                f"{100 * ACCURACY:.1f}."
            )
    return found
