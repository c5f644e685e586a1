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
