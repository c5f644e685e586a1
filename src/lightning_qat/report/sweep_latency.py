"""Measure the latency of all configurations of a sweep after its jobs, when nothing else runs."""

import logging
from collections.abc import Callable, Collection, Sequence

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from lightning_qat.deployment.deployed import DeployedModel
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.deployment.runtimes import Runtime, load
from lightning_qat.errors import UserError
from lightning_qat.report.sweep_configurations import Configuration, Latency
from lightning_qat.targets import checked

log = logging.getLogger(__name__)

FILES = {"torchscript": "model_int8.ts", "onnx": "model_int8.onnx"}
TOGETHER = 8  # configurations that are in memory and interleaved at the same time
SECONDS_EACH = 5.0
# for all configurations; measure_latency always takes its minimum number of rounds
MOST_SECONDS = 120.0


def measure(configurations: Sequence[Configuration], known_targets: Collection[str]) -> None:
    """Measure ``latency`` of each configuration with the files of its first run.

    Measure in groups of ``TOGETHER``. In each group, the eager FP32 network of the first
    configuration is interleaved. It has random weights, because latency does not depend on them.
    Skip a file that cannot be loaded, and log a warning.

    Args:
        known_targets: the networks that the configuration of a job may name.

    Raises:
        UserError: the configuration names another target.
    """
    if not configurations:
        return
    seconds = min(SECONDS_EACH, MOST_SECONDS / len(configurations))
    eager: Callable[[Tensor], Tensor] | None = None
    # Update the bar only between measurements: a thread that draws would disturb them.
    columns = (TextColumn("timing the models of the sweep"), MofNCompleteColumn())
    with Progress(*columns, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(configurations))
        for start in range(0, len(configurations), TOGETHER):
            group = configurations[start : start + TOGETHER]
            loaded = {number: _load(configuration) for number, configuration in enumerate(group)}
            runtimes = {
                f"{number} {name}": _on_its_image(runtime, runtime.description.image_size)
                for number, files in loaded.items()
                for name, runtime in files.items()
            }
            if runtimes:
                if eager is None:
                    first = next(number for number, files in loaded.items() if files)
                    file = next(iter(loaded[first].values()))
                    eager = _fp32(group[first], file, known_targets)
                times = measure_latency(
                    {"fp32_eager": eager} | runtimes,
                    torch.empty(0),  # each runtime has its own image
                    seconds=seconds * len(group),
                )
                for number, configuration in enumerate(group):
                    configuration.latency = _fastest(times, number)
            progress.update(task, advance=len(group), refresh=True)


def _load(configuration: Configuration) -> dict[str, Runtime]:
    loaded: dict[str, Runtime] = {}
    files = {runtime: configuration.folder / name for runtime, name in FILES.items()}
    for runtime, path in files.items():
        if not path.is_file():  # a run may leave out some formats
            continue
        try:
            loaded[runtime] = load(path, threads=1)
        except UserError as error:
            log.warning("not timed: %s", error)
    return loaded


def _fp32(
    configuration: Configuration, file: Runtime, known_targets: Collection[str]
) -> Callable[[Tensor], Tensor]:
    """Return the network that ``file`` was quantized from, with random weights."""
    path = configuration.folder / ".hydra" / "config.yaml"
    described = file.description
    config = checked(OmegaConf.load(path).model.net, known_targets, path)
    net = instantiate(config)(len(described.classes))
    return _on_its_image(DeployedModel(net, described.mean, described.std), described.image_size)


def _on_its_image(model: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """Call the model on its own image, because the image size may differ within a sweep."""
    image = torch.rand(1, 3, size, size)
    return lambda _: model(image)


def _fastest(times: dict[str, dict[str, float]], number: int) -> Latency | None:
    found = {name: times[f"{number} {name}"] for name in FILES if f"{number} {name}" in times}
    if not found:
        return None
    name = min(found, key=lambda name: found[name]["p50"])
    p50 = found[name]["p50"]
    return Latency(name, p50, p50 / times["fp32_eager"]["p50"])
