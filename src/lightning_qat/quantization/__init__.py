"""Quantize networks: prepare them, train or calibrate them, convert them to INT8."""

from lightning_qat.quantization.learned_scale import learned_scales
from lightning_qat.quantization.ptq import PostTrainingQuantization
from lightning_qat.quantization.qat import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QCONFIGS, QConfig

__all__ = [
    "QCONFIGS",
    "PostTrainingQuantization",
    "QConfig",
    "QuantizationAwareTraining",
    "learned_scales",
]
