"""Fuse, prepare, train or calibrate, convert."""

from lightning_qat.quantization.ptq import PostTrainingQuantization
from lightning_qat.quantization.qat import QuantizationAwareTraining
from lightning_qat.quantization.qconfig import QCONFIGS

__all__ = ["QCONFIGS", "PostTrainingQuantization", "QuantizationAwareTraining"]
