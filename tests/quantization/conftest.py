"""Networks and images are the same in every run, whichever tests run with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat import QuantizationAwareTraining
from lightning_qat.quantization import base
from tests.quantization.networks import SmallModule, loader, trainer_with

Fitted = tuple[SmallModule, QuantizationAwareTraining]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A module after its fit, and the callback. Tests that change them take a copy."""
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    folder: Path = tmp_path_factory.mktemp("fitted")
    trainer_with(callback, folder=folder).fit(module, loader(), loader(seed=1))
    return module, callback


@pytest.fixture
def no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the conversion, which takes longer than such a fit."""

    def convert(net: Any, engine: str) -> nn.Module:
        return nn.Identity()

    monkeypatch.setattr(base, "convert", convert)
