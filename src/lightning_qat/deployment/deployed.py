"""The model for deployment: images in, logits out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_qat.atomic import atomic_path
from lightning_qat.deployment.description import KEY, Description


class DeployedModel(nn.Module):
    """A network with its normalization as the first step.

    Args:
        net: turns normalized images into logits, both float32.
        mean, std: normalization per channel, for images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Take RGB images N x 3 x H x W, float32 in [0, 1]; return logits N x classes, float32."""
        return self.net(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Return the input of ``net`` for images in [0, 1]."""
        return (images - self.mean) / self.std


class PixelModel(nn.Module):
    """A deployed model for raw pixels. It returns the logits of the same images in [0, 1].

    Args:
        model: takes images in [0, 1].
        max_value: the pixel value that stands for 1.
    """

    max_value: Tensor

    def __init__(self, model: DeployedModel, max_value: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("max_value", torch.tensor(float(max_value)))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Take RGB images N x 3 x H x W, uint8; return logits N x classes, float32."""
        return self.model(images.float() / self.max_value)


def save_torchscript(scripted: torch.jit.ScriptModule, path: Path, description: Description) -> int:
    """Write ``scripted`` and its description, completely or not at all; return the file's bytes."""
    with atomic_path(path) as partial:
        # If torch opens the path itself, it hides the error of the disk.
        extra = {f"{KEY}.json": description.to_json()}
        partial.write_bytes(scripted.save_to_buffer(_extra_files=extra))
    return path.stat().st_size
