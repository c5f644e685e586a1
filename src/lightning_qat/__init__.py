"""Quantisation aware training for PyTorch Lightning.

The callback is the library: ``QuantizationAwareTraining`` quantises any LightningModule's network.
Everything around it serves ``train.py``.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lightning_qat import _torch_deprecations
from lightning_qat.errors import UserError

if TYPE_CHECKING:
    from lightning_qat.quantization import PostTrainingQuantization, QuantizationAwareTraining

__all__ = ["PostTrainingQuantization", "QuantizationAwareTraining", "UserError", "__version__"]

_torch_deprecations.ignore()

try:
    __version__ = version("lightning-qat")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, which `python train.py --help` does not need
    if name in ("PostTrainingQuantization", "QuantizationAwareTraining"):
        return getattr(import_module("lightning_qat.quantization"), name)
    raise AttributeError(f"module 'lightning_qat' has no attribute {name!r}")
