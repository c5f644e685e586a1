"""How long a call takes, measured so that the numbers can be compared with each other."""

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
LEAST_ROUNDS = 3  # of warm-up and of measurement, however long they take
CALLS_A_TURN = 20  # of which half count
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
    """Milliseconds a call by runtime: p50 and p95, and the number of calls behind them.

    In each round every runtime has its turn, so that a machine which slows down slows all of them
    alike. A turn is some calls in a row, and their second half counts: the others have pushed its
    weights out of the cache, and they take ten calls to be back (ResNet18 in INT8 on Zen 5: 0.98 ms
    the first, 0.53 the second, 0.20 from the ninth on).

    A runtime whose name ends in ``_cuda`` gets the images on the GPU and is waited for; one whose
    description says that it takes pixels gets uint8.

    Args:
        runtimes: name -> what to call. ONNX Runtime and OpenVINO have their own number of threads.
        images: N x 3 x H x W, float32 in [0, 1], on the CPU.
        rounds: how many at most.
        warm_up_rounds: calls of each that do not count, at most.
        seconds: after these the rounds end, and after half of them the warm-up, but none before
            ``LEAST_ROUNDS``.
        threads: of torch.
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
                if threads > 1:  # pools let their threads spin for milliseconds, on all cores
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
    """Seconds of each call that counts: of the only one, where it takes long enough."""
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
