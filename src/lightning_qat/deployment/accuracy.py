"""Top-1 accuracy and agreement on the whole test set."""

from collections.abc import Callable

import torch
from rich.progress import track
from torch import Tensor

from lightning_qat.data.image_datamodule import ImageDataModule

Model = Callable[[Tensor], Tensor]


@torch.inference_mode()
def predict_test_set(
    models: dict[str, Model], datamodule: ImageDataModule
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of every model, and the labels, over the test set on the CPU.

    Returns:
        Logits by name, float32 N x classes, and labels, int64 N.
    """
    loader = datamodule.test_dataloader()
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    for batch in track(loader, description="Testing on the CPU", transient=True):
        images, targets = datamodule.on_after_batch_transfer(batch, 0)
        labels.append(targets)
        for name, model in models.items():
            logits[name].append(model(images))
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images, 0..1, whose highest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def agreement(logits: Tensor, others: Tensor) -> float:
    """Share of images, 0..1, that two models put into the same class, right or wrong."""
    return (logits.argmax(1) == others.argmax(1)).double().mean().item()


# What a runtime has to agree on; the best that was seen is 99.9 % and more for all of them.
AGREEMENT = {"int8_vs_fake_quant": 0.999, "onnx_vs_int8": 0.999, "openvino_vs_int8": 0.995}
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
