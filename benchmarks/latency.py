"""Find the fastest artifact on this machine: measure every runtime side by side.

    python benchmarks/latency.py RUN                       # a finished stage=qat or stage=ptq
    python benchmarks/latency.py model_int8.onnx other.ts  # any exported files
    python benchmarks/latency.py RUN --batch 1 8 --threads 1 --seconds 5

RUN is a run directory. Each cell (batch size and threads) loads everything again, and each runtime
has one turn in every round. Runtimes that are not available are listed as skipped. Writes
benchmarks/results/latency_<model>.json and .md, and prints the fastest artifact of each cell.

Result at 1 image and 1 thread, one run each of 1 minute on 2 cores of an AMD EPYC (Zen 5, VNNI):
ResNet18 with ImageNet's stem, INT8 in ONNX Runtime 0.15 ms, 36.5x FP32 eager and 3.8x the best FP32
runtime. The files in results/ hold all figures, with commit and versions.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from finished_run import (
    FILES,
    FinishedRun,
    Make,
    fp32_runtimes,
    int8_artifacts,
    int8_eager,
    of_file,
    read,
)
from record import RESULTS, origin, origin_in_words, write
from rich.progress import track

from lightning_qat.deployment import runtimes
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.errors import UserError
from lightning_qat.report.titles import fastest, title

BATCHES = [1, 8, 64, 256]
NO_ARTIFACT = ("_eager", "_channels_last", "_cuda")  # not a file to deploy, or not for a CPU


def candidates_of_run(run: FinishedRun, scratch: Path) -> tuple[dict[str, Make], dict[str, str]]:
    """Return every runtime by name, and the skipped runtimes with the reason."""
    skipped: dict[str, str] = {}
    makes = fp32_runtimes(run, scratch, skipped)
    makes |= int8_eager(run, skipped) | int8_artifacts(run, skipped)
    return makes, skipped


def candidates_of_files(paths: list[Path]) -> tuple[dict[str, Make], int]:
    """Return each file under a name that describes it, and the size of the images.

    Raises:
        UserError: a file is no exported model, or the files take images of different sizes.
    """
    makes, sizes = {}, {}
    kinds = {suffix: runtime for runtime, suffix in FILES.items()}
    for path in paths:
        description = runtimes.load(path).description
        number = "int8" if description.qconfig else "fp32"
        makes[f"{number}_{kinds[path.suffix]} {path}"] = of_file(path)
        sizes[path] = description.image_size
    if len(set(sizes.values())) > 1:
        what = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise UserError(f"these take images of different sizes ({what}): measure them apart.")
    return makes, next(iter(sizes.values()))


def measure(
    makes: dict[str, Make], size: int, batches: list[int], threads: list[int], seconds: float
) -> list[dict[str, Any]]:
    """Return one entry per cell: batch, threads, latency_ms and images_per_second by runtime."""
    cells = []
    for count, batch in track(list(product(threads, batches)), "Measuring"):
        images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        fresh = {name: make(count) for name, make in makes.items()}
        latency = measure_latency(fresh, images, seconds=seconds, threads=count)
        cells.append(
            {
                "batch": batch,
                "threads": count,
                "latency_ms": latency,
                "images_per_second": {k: 1e3 * batch / x["p50"] for k, x in latency.items()},
            }
        )
    return cells


def recommend(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the fastest artifact for the CPU in a cell, and its speed-up over FP32."""
    latency = cell["latency_ms"]
    artifact = min(
        (name for name in latency if not name.endswith(NO_ARTIFACT)),
        key=lambda name: latency[name]["p50"],
    )
    best_fp32 = fastest(latency, "fp32")

    def ratio(name: str | None) -> float | None:
        return latency[name]["p50"] / latency[artifact]["p50"] if name in latency else None

    return {
        "artifact": artifact,
        "best_fp32": best_fp32,
        "over_best_fp32": ratio(best_fp32),
        "over_fp32_eager": ratio("fp32_eager"),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return a table for each number of threads, then the recommendation."""
    lines = [f"# Latency: {result['model']}"]
    for threads in dict.fromkeys(cell["threads"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["threads"] == threads]
        heads = [f"batch {cell['batch']}" for cell in cells]
        lines += [
            "",
            f"## {threads} thread{'s' if threads > 1 else ''}",
            "",
            f"| ms a call: median (p95), images/s | {' | '.join(heads)} |",
            f"| --- |{' --- |' * len(heads)}",
        ]
        for name in cells[0]["latency_ms"]:
            entries = [
                f"{cell['latency_ms'][name]['p50']:.2f} ({cell['latency_ms'][name]['p95']:.2f}), "
                f"{cell['images_per_second'][name]:.0f}/s"
                for cell in cells
            ]
            lines.append(f"| {title(name)} | {' | '.join(entries)} |")
    lines += ["", *(f"- skipped: {name}, {why}" for name, why in result["skipped"].items()), ""]
    calls = [x["calls"] for cell in result["cells"] for x in cell["latency_ms"].values()]
    lines.append(
        "Rounds in which each runtime has its turn, the second half of whose calls counts; "
        f"{min(calls)} to {max(calls)} calls counted of each. {origin_in_words(result)}"
    )
    lines += [
        "",
        "## Recommended on this machine",
        "",
        "| batch | threads | fastest artifact | ms | images/s | best FP32 / it | FP32 eager / it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in result["cells"]:
        best = cell["recommendation"]
        name, other = best["artifact"], best["best_fp32"]
        over_best = f"{best['over_best_fp32']:.1f}x ({title(other)})" if other else ""
        over_eager = f"{best['over_fp32_eager']:.1f}x" if best["over_fp32_eager"] else ""
        lines.append(
            f"| {cell['batch']} | {cell['threads']} | {title(name)} "
            f"| {cell['latency_ms'][name]['p50']:.2f} | {cell['images_per_second'][name]:.0f} "
            f"| {over_best} | {over_eager} |"
        )
    return "\n".join(lines) + "\n"


def thread_count(text: str) -> int:
    """Return a number of threads; ``all`` is torch's default."""
    return torch.get_num_threads() if text == "all" else int(text)


def main() -> None:
    """Measure, write, recommend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", type=Path, help="a run directory, or exported files")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", nargs="+", type=thread_count, default=[1, thread_count("all")])
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of a cell")
    parser.add_argument("--out", type=Path, help="without suffix; gets .json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.what[0].is_dir():
            run = read(args.what[0])
            makes, skipped = candidates_of_run(run, Path(scratch))
            model, size = run.description.model, run.datamodule.image_size
        else:
            makes, size = candidates_of_files(args.what)
            skipped, model = {}, "files"
        for name, why in skipped.items():
            print(f"skipped: {name}, {why}")
        cells = measure(makes, size, args.batch, list(dict.fromkeys(args.threads)), args.seconds)
    for cell in cells:
        cell["recommendation"] = recommend(cell)
    result = {"model": model, "skipped": skipped, "cells": cells, **origin()}
    write(result, markdown(result), args.out or RESULTS / f"latency_{model}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
