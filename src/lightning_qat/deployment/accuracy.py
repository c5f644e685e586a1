"""Top-1 accuracy, agreement and divergence on all validation or test images."""

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
    """Return the logits of every model and the labels for all images of a loader, on the CPU.

    Args:
        models: functions that turn float images in [0, 1] into logits.
        loader: the validation or test loader of ``datamodule``.
        datamodule: turns the bytes of the loader into floats.
        doing: text of the progress bar.

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
    """Return the result of ``predict`` for the test set."""
    return predict(models, datamodule.test_dataloader(), datamodule, "Testing")


def validate(models: dict[str, Model], datamodule: ImageDataModule) -> dict[str, Any]:
    """Measure the models on the validation images, because the test set must not choose a model.

    Args:
        models: ``fp32`` and, if it exists, ``int8``.
        datamodule: data module after ``setup``.

    Returns:
        ``images``, their number; ``accuracy`` of each model; with an ``int8``, ``divergence``: the
            mean of KL(FP32 || INT8) between the softmax outputs, in nats. It differs even between
            models that agree on every image. Empty without validation images.
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
    """Return the mean over the images of KL(softmax(`logits`) || softmax(`others`)), in nats."""
    log_p, log_q = (x.double().log_softmax(1) for x in (logits, others))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images, 0..1, whose highest logit belongs to the label."""
    return (logits.argmax(1) == labels).double().mean().item()


def agreement(logits: Tensor, others: Tensor) -> float:
    """Return the share of images, 0..1, that two models put into the same class, right or wrong."""
    return (logits.argmax(1) == others.argmax(1)).double().mean().item()


def identical(logits: Tensor, others: Tensor) -> float:
    """Return the share of images, 0..1, whose logits are the same bit for bit."""
    return (logits == others).all(1).double().mean().item()


# The lowest permitted share of images that two runtimes put into the same class.
AGREEMENT = {
    "onnx_vs_fake_quant": 1.0,
    "int8_vs_fake_quant": 0.999,
    "onnx_vs_int8": 0.999,
    "openvino_vs_fake_quant": 0.995,
}
ACCURACY = 0.001  # the largest permitted difference between accuracies of the same integers
CHANCE = 1  # images whose two best classes may differ by one rounding, in any test set


def shortfalls(
    accuracies: dict[str, float], agreements: dict[str, float], images: int
) -> list[str]:
    """Return sentences about runtimes that differ more than permitted."""
    found = []
    for name, share in agreements.items():
        bound = AGREEMENT.get(name.replace("_uint8", ""), 1.0)
        if (1 - share) * images > max(CHANCE, (1 - bound) * images) + 1e-6:
            one, other = name.split("_vs_")
            found.append(
                f"{one} and {other} agree on {share:.2%} of the {images} test images, and should "
                f"agree on {bound:.2%}: {one} computes other results on this machine. Deploy "
                "another file."
            )
    for name in accuracies:
        difference = accuracies[name] - accuracies["int8"]
        if name != "fp32" and abs(difference) * images > max(CHANCE, ACCURACY * images) + 1e-6:
            found.append(
                f"{name} is {100 * difference:+.2f} points from int8, and should be within "
                f"{100 * ACCURACY:.1f}."
            )
    return found
