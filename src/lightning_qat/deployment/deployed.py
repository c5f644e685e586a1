"""The model as it is handed over: pixels in, logits out."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_qat.atomic import atomic_path
from lightning_qat.deployment.description import KEY, Description
from lightning_qat.quantization.convert import Int8Model, quantised_engine


class DeployedModel(nn.Module):
    """A network with its normalisation in front.

    Args:
        net: normalised images -> logits, float32 in and out.
        mean, std: per channel, of images in [0, 1].
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
        """RGB images N x 3 x H x W, float32 in [0, 1] -> logits N x classes, float32."""
        return self.net(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """What ``net`` takes in, of images in [0, 1]."""
        return (images - self.mean) / self.std


def torchscript(model: nn.Module) -> torch.jit.ScriptModule:
    """``model`` scripted and frozen: weights and normalisation become constants.

    torch keeps the code of whatever it scripts as long as the process lives, and freezing puts the
    weights into it. The code of what it loads goes when the last user does: that is frozen here.
    """
    _forget_freed_operators(model)
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(model.eval()), scripted)
    scripted.seek(0)
    engines = {net.engine for net in model.modules() if isinstance(net, Int8Model)}
    with quantised_engine(engines.pop() if engines else torch.backends.quantized.engine):
        return torch.jit.freeze(torch.jit.load(scripted))


def _forget_freed_operators(model: nn.Module) -> None:
    """Take from torch's list of operators the addresses at which ``model`` has something else.

    The list keeps addresses of operators that are freed when torch.library adds to them. Now and
    then (one run in dozens, torch 2.15) an attribute comes to lie at one of them, and scripting
    fails with "builtin cannot be used as a value".
    """
    operators = torch.jit._builtins._get_builtin_table()
    for module in model.modules():
        for value in vars(module).values():
            if not callable(value):
                operators.pop(id(value), None)


def save_torchscript(scripted: torch.jit.ScriptModule, path: Path, description: Description) -> int:
    """Write ``scripted`` with its description, whole or not at all; gives the file's bytes."""
    with atomic_path(path) as partial:
        # given a path, torch hides what the disk answers
        extra = {f"{KEY}.json": description.to_json()}
        partial.write_bytes(scripted.save_to_buffer(_extra_files=extra))
    return path.stat().st_size
