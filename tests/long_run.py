"""Parts for tests of long runs: a small network, and a measurement of the training process."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn


class TinyNet(nn.Module):
    """A network N x 3 x 8 x 8 -> N x classes."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.hidden = nn.Linear(8 * 16, width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc(self.relu(self.hidden(x)))


def look() -> dict[str, int]:
    """Return the resident bytes, open files, threads and Python objects of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
    }


class Watch(pl.Callback):
    """Append a line to ``file`` at the start of every n-th epoch."""

    def __init__(self, file: str, every: int) -> None:
        self.file, self.every = Path(file), every

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch % self.every == 0:
            with self.file.open("a") as file:
                file.write(json.dumps(look()) + "\n")
