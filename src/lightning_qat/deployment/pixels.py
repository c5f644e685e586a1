"""The INT8 network for raw pixels: normalisation and first quantisation are one table."""

import copy

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq

from lightning_qat.quantization.convert import Int8Model


class QuantisePixels(nn.Module):
    """Pixels to the integers that normalising and quantising makes of them: one look-up.

    Args:
        quantise: the network's first quantisation.
        max_value: the pixel value that stands for 1.
        mean, std: float32 1 x 3 x 1 x 1, of images in [0, 1].
    """

    table: Tensor
    rows: Tensor

    def __init__(self, quantise: nnq.Quantize, max_value: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.scale, self.zero_point = float(quantise.scale), int(quantise.zero_point)
        # the operations that float images go through, in the same order, for every pixel there is
        images = torch.arange(256.0).div(torch.tensor(float(max_value))).view(1, 1, 1, 256)
        self.register_buffer("table", quantise((images - mean) / std).int_repr().flatten())
        self.register_buffer("rows", torch.arange(0, 768, 256).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Pixels uint8 N x 3 x H x W -> quint8 of the same shape."""
        integers = torch.take(self.table, images.long() + self.rows)
        return torch._make_per_tensor_quantized_tensor(integers, self.scale, self.zero_point)


class NormalisePixels(nn.Module):
    """Where the first layer is in float, there is no quantisation to fold into."""

    max_value: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, max_value: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("max_value", torch.tensor(float(max_value)))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels uint8 N x 3 x H x W -> float32 of the same shape."""
        return (images.float() / self.max_value - self.mean) / self.std


def for_pixels(int8_model: Int8Model, max_value: int, mean: Tensor, std: Tensor) -> Int8Model:
    """A copy of ``int8_model`` that takes uint8 pixels N x 3 x H x W and normalises by itself.

    Its logits are, bit by bit, those of ``int8_model`` on the normalised pixels.
    """
    model = copy.deepcopy(int8_model)
    images = next(node for node in model.graph.nodes if node.op == "placeholder")
    (first, *others) = images.users
    if first.target == "float" and not others:  # as it stands in front of a first quantisation
        (first, *others) = first.users
    module = model.get_submodule(str(first.target)) if first.op == "call_module" else None
    if isinstance(module, nnq.Quantize) and not others:
        model.add_submodule(str(first.target), QuantisePixels(module, max_value, mean, std))
        first.args = (images,)
        model.graph.eliminate_dead_code()
    else:
        model.add_submodule("normalise_pixels", NormalisePixels(max_value, mean, std))
        with model.graph.inserting_after(images):
            normalised = model.graph.call_module("normalise_pixels", (images,))
        images.replace_all_uses_with(normalised, lambda user: user is not normalised)
    model.recompile()
    return model
