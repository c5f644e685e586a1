"""A callback that times the training step in a fit of `train.py`; see training_step.py."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_qat.quantization.attach import quantized_networks

MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
PRODUCTS = 20


class StepTiming(pl.Callback):
    """Time the data path alone, then the step alone, then both in Lightning's loop.

    The network is in the state of the fit (fake-quantized, compiled, on its device). Its observers
    and batch-norm statistics are active, as in the first epochs. The step alone is forward, loss,
    backward and optimizer, again and again on one batch.

    Args:
        path: file for the figures, as JSON.
        steps: number of steps that count, for each of the three.
        warm_up: steps before them, at least 1; the first step compiles.
    """

    def __init__(self, path: str, steps: int, warm_up: int) -> None:
        self.path, self.steps, self.warm_up = Path(path), steps, warm_up
        self.figures: dict[str, Any] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Time data path and step before the second batch, when steps become compiled."""
        if batch_idx != 1:
            return
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loader: Any = trainer.train_dataloader
        batches = itertools.chain.from_iterable(itertools.repeat(loader))

        def fetch() -> Any:
            # With transfer and augmentation.
            return trainer.strategy.batch_to_device(next(batches), dataloader_idx=0)

        self.batch = fetch()
        for quantization in quantized_networks(pl_module):
            quantization.observe(True)
        start = time.perf_counter()
        self.step(trainer, pl_module)
        _wait(device)
        self.figures |= {
            "batch_size": len(self.batch[0]),
            "first_step_seconds": time.perf_counter() - start,
            "data_ms": self._percentiles(fetch, device),
            "step_ms": self._percentiles(lambda: self.step(trainer, pl_module), device),
        }

    def step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run one training step without data path and Lightning."""
        images, labels = self.batch
        optimizer = trainer.optimizers[0]
        with trainer.precision_plugin.train_step_context():
            loss = F.cross_entropy(pl_module(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Time Lightning's loop between two steps, and wait for the device at both."""
        done = trainer.global_step
        if done == self.warm_up + 1:
            _wait(pl_module.device)
            self.loop_start = time.perf_counter()
        elif done == self.warm_up + 1 + self.steps:
            _wait(pl_module.device)
            seconds = time.perf_counter() - self.loop_start
            self.figures["loop_images_per_second"] = (
                self.steps * self.figures["batch_size"] / seconds
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add memory, operations and the device's matrix rate, and write all figures."""
        device, figures = pl_module.device, self.figures
        figures["peak_bytes"] = None
        if device.type == "cuda":  # of the fit, before the matrices below
            figures["peak_bytes"] = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.step(trainer, pl_module)
        bf16 = str(trainer.precision).startswith("bf16")
        figures["operations"] = counter.get_total_flops()
        figures["matrix_rate"] = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32)
        rate = figures["operations"] / figures["step_ms"]["p50"] * 1e3
        figures["share_of_matrix_rate"] = rate / figures["matrix_rate"]
        self.path.write_text(json.dumps(figures))

    def _percentiles(self, call: Callable[[], Any], device: torch.device) -> dict[str, float]:
        for _ in range(self.warm_up):
            call()
        times = periods_ms(call, self.steps, device)
        return {"p50": float(np.percentile(times, 50)), "p95": float(np.percentile(times, 95))}


def periods_ms(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Return the milliseconds from the end of one call to the end of the next, on the device.

    Do not wait for the calls on a GPU, as in training. So a period is the time of the call or the
    time that Python needs to launch it, whichever is longer.
    """
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            call()
            times.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    _wait(device)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    _wait(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of a product of large random matrices; float32 may use TF32."""
    size = MATRIX_SIZE[device.type]
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(PRODUCTS):
            left @ right
        times = periods_ms(lambda: left @ right, PRODUCTS, device)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / float(np.median(times)) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
