"""Use the same networks and images in every run, for any choice of tests."""

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
    """Return a module after its fit, and the callback. Tests that change them use a copy."""
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining()
    folder: Path = tmp_path_factory.mktemp("fitted")
    trainer_with(callback, folder=folder).fit(module, loader(), loader(seed=1))
    return module, callback


@pytest.fixture
def no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the conversion, which takes longer than such a fit."""

    def convert(net: Any, engine: str) -> nn.Module:
        return nn.Identity()

    monkeypatch.setattr(base, "convert", convert)
