"""How long one image takes, measured so that the numbers can be compared with each other."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

WARM_UP_ROUNDS = 20  # TorchScript optimises in its first runs
ROUNDS = 200
SECONDS = 20.0  # a large network ends earlier, after at least 20 rounds


@torch.inference_mode()
def measure_latency(
    runtimes: dict[str, Callable[[Tensor], Tensor]],
    image: Tensor,
    rounds: int = ROUNDS,
    warm_up_rounds: int = WARM_UP_ROUNDS,
) -> dict[str, dict[str, float]]:
    """Milliseconds a call, p50 and p95 by runtime, on one thread.

    One round calls every runtime once, so that a machine which slows down slows all of them alike.
    A runtime whose name ends in ``_cuda`` gets the image on the GPU and is waited for.

    Args:
        runtimes: name -> what to call.
        image: one image, 1 x 3 x H x W, float32, on the CPU.
        rounds: how many; after ``SECONDS`` no more than ``warm_up_rounds``.
        warm_up_rounds: calls that are not counted.
    """
    inputs = {name: image.cuda() if name.endswith("_cuda") else image for name in runtimes}
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    with _one_thread():
        for name, runtime in runtimes.items():
            for _ in range(warm_up_rounds):
                runtime(inputs[name])
        end = time.perf_counter() + SECONDS
        for round_ in range(rounds):
            if round_ >= warm_up_rounds and time.perf_counter() > end:
                break
            for name, runtime in runtimes.items():
                _wait(inputs[name])
                start = time.perf_counter()
                runtime(inputs[name])
                _wait(inputs[name])
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {"p50": float(np.percentile(x, 50)), "p95": float(np.percentile(x, 95))}
        for name, x in times.items()
    }


def _wait(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
