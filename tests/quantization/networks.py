"""Small networks in the style of other projects, and a LightningModule to train them fast."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """A residual block that uses one ReLU module twice, as in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class SmallNet(nn.Module):
    """Stem, residual block, pool, linear: N x 3 x 8 x 8 -> N x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Block(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SmallModule(pl.LightningModule):
    """A user's LightningModule with its network in `net`."""

    def __init__(self, net: nn.Module | None = None, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.net: Any = net or SmallNet()
        self.learning_rate = learning_rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class BuildsLate(SmallModule):
    """Build the network in `configure_model`, as Lightning advises for large networks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = SmallNet()


def images(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images, and the brightest quadrant of each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        x[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return x, labels


def loader(seed: int = 0, scale: float = 1.0) -> DataLoader[tuple[Tensor, ...]]:
    x, labels = images(seed=seed)
    return DataLoader(TensorDataset(x * scale, labels), batch_size=16)


def trainer_with(*callbacks: pl.Callback, folder: Path, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_epochs": 2,
            "callbacks": list(callbacks),
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            **kwargs,
        }
    )
