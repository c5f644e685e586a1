"""The data sets. Each is a LightningDataModule that holds its images as uint8 in memory."""

from lightning_qat.data.cifar10 import CIFAR10DataModule
from lightning_qat.data.digits import DigitsDataModule
from lightning_qat.data.folder import FolderDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule", "FolderDataModule"]
