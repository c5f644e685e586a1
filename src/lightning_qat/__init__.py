"""Quantization-aware training for PyTorch Lightning.

The library is the callback ``QuantizationAwareTraining``. It quantizes the network of any
LightningModule. All other modules serve ``train.py``.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lightning_qat import _torch_deprecations
from lightning_qat.errors import UserError

if TYPE_CHECKING:
    from lightning_qat.quantization import (
        PostTrainingQuantization,
        QConfig,
        QuantizationAwareTraining,
    )
    from lightning_qat.quantization.damage import layer_damage
    from lightning_qat.quantization.to_onnx import to_onnx
    from lightning_qat.quantization.to_openvino import to_openvino

__all__ = [
    "PostTrainingQuantization",
    "QConfig",
    "QuantizationAwareTraining",
    "UserError",
    "__version__",
    "layer_damage",
    "qconfigs",
    "to_onnx",
    "to_openvino",
]

_MODULES = {
    "layer_damage": "quantization.damage",
    "to_onnx": "quantization.to_onnx",
    "to_openvino": "quantization.to_openvino",
}

_torch_deprecations.ignore()

try:
    __version__ = version("lightning-qat")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def qconfigs() -> list[str]:
    """Return the names that are valid for ``qconfig``."""
    return list(import_module("lightning_qat.quantization").QCONFIGS)


def __getattr__(name: str) -> Any:
    # The import of torch takes seconds, and `python train.py --help` does not need it.
    if name in __all__:
        return getattr(import_module(f"lightning_qat.{_MODULES.get(name, 'quantization')}"), name)
    raise AttributeError(f"module 'lightning_qat' has no attribute {name!r}")
