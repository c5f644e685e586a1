"""Measure the training speed of the tutorial's loop and of this project, side by side.

    python benchmarks/training.py                       # ResNet18 with ImageNet's stem, CIFAR-10
    python benchmarks/training.py --model resnet18 --steps 5 --rounds 3  # the CIFAR stem
    python benchmarks/training.py --steps 200           # on a GPU, taken where there is one
    python benchmarks/training.py --smoke               # does all of it run? digits, few steps

The tutorial is Lei Mao, "PyTorch Quantization Aware Training". Its loop (`training_origin.py`)
reads PIL images through transforms in worker processes, and has its own network and step. This
project's loop (`training_ours.py`) is the one that `train.py` composes and runs, with Lightning,
loggers and progress bar. Both get the same images, augmentations, first weights and batch size.
Neither validates.
The times are measured from batch to batch. Measured are: FP32 and QAT (as in the first epochs, with
observers on); the tutorial's QAT as it is written (it only observes) and fixed (it fake-quantizes);
the steps alone, on a batch that is ready; the data path alone, up to normalized floats on the
device.

Each loop has one segment in turn in each round, in reverse order in every second round. The first
steps of a segment do not count, because workers start and caches fill. A ratio is the median over
the rounds. Writes benchmarks/results/training_<model>.json and .md, with `_gpu` after the model if
a GPU was used. It takes about 7 minutes on 2 cores. With the CIFAR stem as above, it may take an
hour (not tried).
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import training_origin as origins
from record import RESULTS, origin, write
from tables_training import RACES, measured_how, ratio_table
from training_ours import CONF, Ours

from lightning_qat.errors import UserError

WARM_UP = 5  # steps: two workers fetch 4 batches ahead
DATA_STEPS = 3  # batches of the data path for each step of the loops: they take less time
LEARNING_RATE = 0.01  # for all loops: training from random weights must not diverge
ORIGINS_WORKERS = 8
SMOKE = ["data=digits", "data.batch_size=16"]
# and the same crops as in this project
ORIGINS_AUGMENTATION = ["data.flip=random", "data.cutout=0"]


class Stopwatch(pl.Callback):
    """Record the time at the end of each step, without making a GPU wait in steps that count."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device = device
        self.first, self.last = WARM_UP, WARM_UP + steps
        self.batches = self.last + 1  # the end of an epoch, after its last batch, does not count
        self.ends: list[float] = []

    def tick(self) -> None:
        """Record the end of a step."""
        if self.device.type == "cuda" and len(self.ends) + 1 in (self.first, self.last):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the end of a step, called by Lightning."""
        self.tick()

    def follow(self, steps: Iterable[Any]) -> None:
        """Run a loop that yields after each step."""
        for _ in islice(steps, self.batches):
            self.tick()

    def seconds(self) -> list[float]:
        """Return the seconds of each counted step. On a GPU, it ends when Python launched it."""
        ends = self.ends[self.first - 1 : self.last]
        if len(ends) <= self.last - self.first:
            raise UserError(
                f"an epoch ended after {len(self.ends)} steps and a segment has {self.batches}: "
                "give it fewer --steps."
            )
        return np.diff(ends).tolist()


Loop = Callable[[Stopwatch], None]


def loops_of(ours: Ours, device: torch.device, workers: int) -> dict[str, Loop]:
    """Return all measured loops, by the names in `RACES`."""
    dataset: Any = ours.datamodule.train_dataloader().dataset
    images, labels = (x[dataset.indices] for x in dataset.data)
    pil_images = origins.PILImages(images, labels, ours.datamodule.crop_padding)
    loader = origins.loader(pil_images, ours.datamodule.batch_size, workers)
    ready = {
        "ours": next(ours.batches(device)),
        "origin": [x.to(device) for x in next(iter(loader))],
    }

    def fit(stage: str, watch: Stopwatch, batch: Any = None) -> None:
        ours.fit(stage, watch.batches, watch, batch)

    def train(qconfig: str | None, batches: Iterable[Any], watch: Stopwatch) -> None:
        net: Any = origins.network(ours.net)
        if qconfig is not None:
            net = origins.prepare_qat(net, origins.QCONFIGS[qconfig]())
        watch.follow(origins.train(net, batches, device, LEARNING_RATE))

    def transferred() -> Iterable[Any]:
        return ([x.to(device) for x in batch] for batch in loader)

    again = repeat(ready["origin"])
    return {
        "ours_fp32": partial(fit, "fp32"),
        "origin_fp32": partial(train, None, loader),
        "ours_qat": partial(fit, "qat"),
        "origin_qat_mended": partial(train, "mended", loader),
        "origin_qat_as_written": partial(train, "as_written", loader),
        "ours_step_fp32": partial(fit, "fp32", batch=ready["ours"]),
        "origin_step_fp32": partial(train, None, again),
        "ours_step_qat": partial(fit, "qat", batch=ready["ours"]),
        "origin_step_qat": partial(train, "mended", again),
        "ours_data": lambda watch: watch.follow(ours.normalised(device)),
        "origin_data": lambda watch: watch.follow(transferred()),
    }


def measure(
    loops: dict[str, Loop], device: torch.device, batch_size: int, steps: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return for each loop: images/s of each round, and milliseconds per step over all rounds."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in reversed(loops) if number % 2 else loops:
            watch = Stopwatch(device, DATA_STEPS * steps if name.endswith("_data") else steps)
            loops[name](watch)
            seconds[name].append(watch.seconds())
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return {
        name: {
            "images_per_second": [batch_size * len(x) / sum(x) for x in segments],
            "step_ms": {
                f"p{percent}": 1e3 * float(np.percentile(segments, percent)) for percent in (50, 95)
            },
        }
        for name, segments in seconds.items()
    }


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return this project / the tutorial for each of `RACES`: median and range of the rounds."""
    found = {}
    for race, (_, ours, theirs) in RACES.items():
        pairs = zip(*(figures[x]["images_per_second"] for x in (ours, theirs)), strict=True)
        values = [mine / other for mine, other in pairs]
        found[race] = {"p50": statistics.median(values), "min": min(values), "max": max(values)}
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return the ratios, then each loop."""
    lines = [
        f"# Training: {result['model']}",
        "",
        ratio_table(result),
        "",
        "| | images/s, median of the rounds | ms a step: median (p95) |",
        "| --- | --- | --- |",
    ]
    for name, figures in result["loops"].items():
        step, rate = figures["step_ms"], statistics.median(figures["images_per_second"])
        lines.append(f"| {name} | {rate:.0f} | {step['p50']:.2f} ({step['p95']:.2f}) |")
    return "\n".join([*lines, "", measured_how(result)]) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = sorted(path.stem for path in (CONF / "model").iterdir())
    parser.add_argument("--model", default="resnet18_imagenet_stem", choices=models)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=20, help="that count, of a segment")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="see that all of it runs")
    parser.add_argument("--out", type=Path, help="a folder, instead of benchmarks/results")
    args = parser.parse_args()
    data = ["data=cifar10", "data.batch_size=128"]
    if args.smoke:
        data, args.steps, args.rounds = SMOKE, 4, 1
    out = args.out or (Path(tempfile.mkdtemp()) if args.smoke else RESULTS)
    torch.set_num_threads(args.threads)
    # Lightning logs the same lines in each round
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Please use quant_min and quant_max")
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    workers = min(ORIGINS_WORKERS, args.threads)
    overrides = [
        *data,
        *ORIGINS_AUGMENTATION,
        f"model={args.model}",
        f"trainer={args.device}",
        "trainer.max_epochs=1",
        "data.val_size=0",
        f"model.learning_rate={LEARNING_RATE}",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        ours = Ours(overrides, Path(scratch))
        batch_size = ours.datamodule.batch_size
        loops = loops_of(ours, device, workers)
        figures = measure(loops, device, batch_size, args.steps, args.rounds)
    result = {
        "model": ours.model,
        "overrides": overrides,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "batch_size": batch_size,
        "warm_up": WARM_UP,
        "steps": args.steps,
        "rounds": args.rounds,
        "workers": workers,
        "ratios": ratios(figures),
        "loops": figures,
        **origin(),
    }
    stem = out / f"training_{ours.model}{'_gpu' if on_gpu else ''}"
    write(result, markdown(result), stem)
    print(f"in {stem}.json and .md")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
