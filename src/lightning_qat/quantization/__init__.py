"""Fuse, prepare, train or calibrate, convert."""

from lightning_qat.quantization.learned_scale import learned_scales
from lightning_qat.quantization.ptq import PostTrainingQuantization
from lightning_qat.quantization.qat import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QCONFIGS, make_qconfig

__all__ = [
    "QCONFIGS",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "learned_scales",
    "make_qconfig",
]
