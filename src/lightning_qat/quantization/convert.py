"""From the trained fake-quantised network to integers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as tq


def convert(fake_quantised: nn.Module, engine: str) -> nn.Module:
    """A converted INT8 copy of ``fake_quantised`` for the CPU, in eval mode.

    Every scale and zero point is the one that the fake-quantiser last used in training.
    torch's ``convert`` asks the fake-quantiser's *observer* instead, which computes another scale
    for weights (max|w| / 127.5 against max|w| / 127) and then rounds 15 % of a first layer's
    weights one step away from where they were trained.

    Its attribute ``engine`` says which of torch's quantised engines it is packed for.

    Raises:
        RuntimeError: a layer has no integer kernel in ``engine``.
    """
    model = copy.deepcopy(fake_quantised).cpu().eval()
    for module in model.modules():
        if isinstance(module, tq.FakeQuantizeBase):
            module.disable_observer()  # convert passes the weights through once more
            module.calculate_qparams = _TrainedQParams(module)  # type: ignore[assignment]
    with quantised_engine(engine):
        model = tq.convert(model, inplace=True)
    model.engine = engine
    return model


@contextmanager
def quantised_engine(engine: str) -> Iterator[None]:
    """Let torch pack and load quantised weights for ``engine``, which is global in torch."""
    previous, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


class _TrainedQParams:
    """``calculate_qparams`` that gives what training used."""

    def __init__(self, fake_quant: Any) -> None:
        self.fake_quant = fake_quant

    def __call__(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.fake_quant.scale, self.fake_quant.zero_point
        if scale.numel() == 1:  # quantised batch-norm wants numbers, not vectors of one
            return scale.reshape(()), zero_point.reshape(())
        return scale, zero_point
