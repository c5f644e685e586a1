"""Make a table of the accuracy that few bits lose and recover, from finished sweeps.

python benchmarks/few_bits.py SWEEP... [--batches 100] --out benchmarks/results/few_bits

A SWEEP is the folder of a multirun. Each row is a configuration, with the mean of its seeds. The
other rows of a sweep are compared with its first row, seed by seed. Each QAT run is also compared
with itself after its batch-norm statistics were estimated again, from this number of batches of
training images (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", 2022,
section 3.3). train.py has no option for this estimation, because it does not help there: see the
table.
"""

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from finished_run import FinishedRun, read
from record import origin, origin_in_words, write
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.deployment.accuracy import accuracy, predict_test_set
from lightning_qat.quantization.convert import convert
from lightning_qat.report.intervals import student
from lightning_qat.report.sweep_configurations import LEAST_SEEDS, Configuration, configurations
from lightning_qat.report.sweep_runs import read_runs


def main() -> None:
    """Read the sweeps, estimate batch-norm again, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--batches", type=int, default=100, help="0 = keep the batch-norm")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = [configurations(read_runs(sweep)) for sweep in args.sweeps]
    sweeps = [[row(x, args.batches) for x in each if x.network == "int8"] for each in found]
    result = {"sweeps": sweeps, "batches": args.batches, **origin()}
    write(result, "\n\n".join([*map(table, sweeps), origin_in_words(result)]) + "\n", args.out)


def row(configuration: Configuration, batches: int) -> dict[str, Any]:
    """Return accuracies of a configuration, one per seed, before and after a new estimation."""
    metrics = [run.metrics for run in configuration.runs]
    anew = None
    if metrics[0]["stage"] == "qat" and batches:
        anew = [estimated_anew(read(run.folder), batches) for run in configuration.runs]
    return {
        "label": configuration.label,
        "command": metrics[0]["command"],
        "commits": sorted({str(x["environment"]["commit"]) for x in metrics}),
        "seeds": configuration.seeds,
        "epochs": metrics[0]["epochs"],
        "fp32": [x["accuracy"]["fp32"] for x in metrics],
        "int8": [x["accuracy"]["int8"] for x in metrics],
        "anew": anew,
        "accuracy": [configuration.accuracy.value, configuration.accuracy.ends],
        "megabytes": configuration.megabytes,
    }


def estimated_anew(run: FinishedRun, batches: int) -> float:
    """Return the INT8 test accuracy after the batch-norm statistics were estimated again."""
    assert run.fake_quant is not None
    assert run.int8 is not None
    net: Any = copy.deepcopy(run.fake_quant)
    run.datamodule.setup("fit")
    estimate_batch_norm(net, run, batches)
    int8 = run.deployed(convert(net, run.int8.engine))
    logits, labels = predict_test_set({"int8": int8}, run.datamodule)
    return accuracy(logits["int8"], labels)


@torch.no_grad()
def estimate_batch_norm(net: nn.Module, run: FinishedRun, batches: int) -> None:
    """Estimate mean and variance from these batches with equal weights, with quantized weights."""
    deployed = run.deployed(net)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    net.train()  # a quantized network in evaluation mode uses its stored statistics
    for batch in itertools.islice(run.datamodule.train_dataloader(), batches):
        images, _ = run.datamodule.on_after_batch_transfer(batch, 0)
        deployed(images)
    net.eval()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown; differences are in points."""
    lines = [
        "| configuration | INT8 test accuracy | INT8 - FP32 | to the first row "
        "| batch-norm estimated again | MB, packed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        share, ends = each["accuracy"]
        same_seeds = each is not rows[0] and each["seeds"] == rows[0]["seeds"]
        cells = [
            f"`{each['label']}`",
            f"{share:.2%} ({100 * ends[0]:.2f} to {100 * ends[1]:.2f})",
            difference(each["int8"], each["fp32"]),
            difference(each["int8"], rows[0]["int8"]) if same_seeds else "",
            difference(each["anew"], each["int8"]) if each["anew"] else "",
            f"{each['megabytes']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(ours: list[float], theirs: list[float]) -> str:
    """Return the mean over the seeds, with its 95 % t interval if there are enough seeds."""
    points = [100 * (x - y) for x, y in zip(ours, theirs, strict=True)]
    mean = sum(points) / len(points)
    if len(points) < LEAST_SEEDS or len(set(points)) == 1:
        return f"{mean:+.2f}"
    low, high = student(points)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
