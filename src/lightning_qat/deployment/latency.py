"""Measure the time of a call, so that the numbers of several runtimes can be compared."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lightning_qat.deployment.description import PIXELS

WARM_UP_ROUNDS = 20  # TorchScript optimizes in its first runs
ROUNDS = 10
SECONDS = 20.0
LEAST_ROUNDS = 3  # minimum for warm-up and measurement, even if they take long
CALLS_A_TURN = 20  # the second half of them counts
TURN_SECONDS = 0.05
PAUSE_SECONDS = 0.01


@torch.inference_mode()
def measure_latency(
    runtimes: dict[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    rounds: int = ROUNDS,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    *,
    seconds: float = SECONDS,
    threads: int = 1,
) -> dict[str, dict[str, float]]:
    """Return milliseconds per call by runtime: p50 and p95, and the number of calls.

    In each round, every runtime has one turn, so that a slow phase of the machine affects all of
    them equally. A turn is several calls in a row, and only the second half counts. The other
    runtimes have removed the weights of this one from the cache, and ten calls are needed to load
    them again (ResNet18 in INT8 on Zen 5: 0.98 ms for the first call, 0.53 for the second, 0.20
    from the ninth on).

    A runtime whose name ends in ``_cuda`` gets the images on the GPU, and the timing waits for the
    GPU. A runtime whose description says pixels gets uint8.

    Args:
        runtimes: functions to call, by name. ONNX Runtime and OpenVINO have their own number of
            threads.
        images: N x 3 x H x W, float32 in [0, 1], on the CPU.
        rounds: largest number of rounds.
        warm_up_rounds: largest number of rounds that do not count.
        seconds: time limit of the rounds. The warm-up ends after half of it. There are always at
            least ``LEAST_ROUNDS``.
        threads: number of threads of torch.
    """
    inputs = {name: _input(name, runtime, images) for name, runtime in runtimes.items()}
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    with _torch_threads(threads):
        for name, runtime in runtimes.items():
            end = time.perf_counter() + seconds / 2 / len(runtimes)
            for round_ in range(warm_up_rounds):
                if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
                    break
                runtime(inputs[name])
        end = time.perf_counter() + seconds
        for round_ in range(rounds):
            if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name, runtime in runtimes.items():
                if threads > 1:  # idle threads of a pool keep all cores busy for milliseconds
                    time.sleep(PAUSE_SECONDS)
                times[name] += _turn(runtime, inputs[name])
    return {
        name: {
            "p50": 1e3 * float(np.percentile(x, 50)),
            "p95": 1e3 * float(np.percentile(x, 95)),
            "calls": len(x),
        }
        for name, x in times.items()
    }


def _turn(runtime: Callable[[Tensor], Tensor], images: Tensor) -> list[float]:
    """Return the seconds of each call that counts. A slow runtime has only one call."""
    times: list[float] = []
    while len(times) < CALLS_A_TURN and sum(times) < TURN_SECONDS:
        _wait(images)
        start = time.perf_counter()
        runtime(images)
        _wait(images)
        times.append(time.perf_counter() - start)
    return times[len(times) // 2 :]


def _input(name: str, runtime: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    description = getattr(runtime, "description", None)
    if description is not None and description.input == PIXELS:
        return images.mul(description.max_value).round().to(torch.uint8)
    return images.cuda() if name.endswith("_cuda") else images


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
