"""Make the tables of the GPU measurements, from the files of gpu/run.py.

python benchmarks/tables_gpu.py benchmarks/results/gpu
"""

import itertools
import json
import math
import statistics
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from scipy.stats import t

Results = dict[str, dict[str, Any]]

NOT_YET = "not measured yet"
HOW = "`benchmarks/gpu/README.md`"
RUNS = {  # row of the table -> the names of its pieces
    "CIFAR stem": "{}_seed*",
    "`experiment=seed`": "seed_experiment_{}",
}
FEW_BITS = {"W4A4": "w4a4_lsq_seed*", "W2A2": "w2a2_lsq_seed*"}
PRECISIONS = ("32-true", "bf16-mixed")
MODES = ("eager", "default")


def load(folder: Path) -> Results:
    """Return the existing results, by the name of the piece."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def gpu_summary(results: Results) -> str:
    """Return all tables, and where they were measured. A cell without a result says so."""
    if not results:
        return f"Nothing has been measured on a GPU yet: {HOW} measures it."
    parts = (accuracy_table, few_bits_table, step_table, remarks, origins)
    return "\n\n".join(part(results) for part in parts)


def accuracy_table(results: Results) -> str:
    """Return one row per recipe: means over the seeds, and differences of networks of one seed."""
    lines = [
        "| ResNet18 | epochs | FP32 | QAT INT8 | QAT - FP32, points | PTQ - FP32, points "
        "| training, FP32 + QAT |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, names in RUNS.items():
        fp32, qat, ptq = (_matching(results, names.format(x)) for x in ("fp32", "qat", "ptq"))
        cells = [
            " + ".join(str(runs[0]["epochs"]) for runs in (fp32, qat) if runs) or NOT_YET,
            _accuracy(fp32, "fp32"),
            _accuracy(qat, "int8"),
            _difference(qat),
            _difference(ptq),
            f"{_time(fp32)} + {_time(qat)}" if fp32 and qat else NOT_YET,
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def few_bits_table(results: Results) -> str:
    """Return one row per number of bits, with learned scales, on the CIFAR stem."""
    lines = [
        "| CIFAR stem, learned scales | epochs of QAT | INT8 | INT8 - FP32, points |",
        "| --- | --- | --- | --- |",
    ]
    for label, names in FEW_BITS.items():
        runs = _matching(results, names)
        epochs = str(runs[0]["epochs"]) if runs else NOT_YET
        cells = [epochs, _accuracy(runs, "int8"), _difference(runs)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def step_table(results: Results) -> str:
    """Return one row per precision and torch.compile mode, with the CIFAR stem."""
    lines = [
        "| training step | torch.compile | FP32, ms | QAT, ms | QAT / FP32 | loop, images/s "
        "| data path / step | GPU memory | share of matrix rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    steps = results.get("steps", {"precisions": {}})["precisions"]
    for precision, mode in itertools.product(PRECISIONS, MODES):
        head = f"| {precision} | {mode} "
        figures = steps.get(precision, {}).get(mode)
        if figures is None or any("error" in x for x in figures.values()):
            lines.append(f"{head}| {NOT_YET if figures is None else 'failed'} |{' |' * 6}")
            continue
        both = [figures["fp32"], figures["qat"]]
        cells = [
            *(f"{x['step_ms']['p50']:.2f} (p95 {x['step_ms']['p95']:.2f})" for x in both),
            f"{both[1]['step_ms']['p50'] / both[0]['step_ms']['p50']:.2f}",
            " / ".join(f"{x['loop_images_per_second']:,.0f}" for x in both),
            " / ".join(f"{x['data_ms']['p50'] / x['step_ms']['p50']:.1%}" for x in both),
            " / ".join(_memory(x) for x in both),
            " / ".join(f"{x['share_of_matrix_rate']:.0%}" for x in both),
        ]
        lines.append(f"{head}| {' | '.join(cells)} |")
    return "\n".join(lines)


def remarks(results: Results) -> str:
    """Return the meaning of the figures, and the two figures that need no table."""
    same = []
    for stage in ("fp32", "qat"):
        result = results.get(f"deterministic_{stage}")
        verdict = NOT_YET
        if result is not None:
            verdict = "the same" if result["identical"] else f"{len(result['differ'])} differ"
        same.append(f"{stage.upper()} {verdict}")
    runs = _matching(results, "fp32_seed*")
    latencies = [run["latency_ms"]["fp32_cuda"]["p50"] for run in runs if _has_cuda(run)]
    latency = f"{statistics.median(latencies):.2f} ms" if latencies else NOT_YET
    memory = NOT_YET
    if "memory" in results:
        memory_of = results["memory"]
        modes = memory_of["precisions"]["bf16-mixed"]["eager"]
        memory = " / ".join(_memory(modes[stage]) for stage in ("fp32", "qat"))
        memory += f" at batch {memory_of['batch_size']}"
    return (
        "Accuracy: of the test set, last weights, mean and range over the seeds; ±: 95 % t "
        "interval over the differences of each seed. Training: wall-clock of the fit. Step: "
        "forward, loss, backward and optimizer at batch 512, CIFAR stem, with observers at work; "
        "32-true has TF32 in convolutions; two figures are FP32 / QAT; memory is what torch has "
        f"reserved at the peak (eager, bf16-mixed, larger: {memory}); matrix rate: of an 8192 x "
        "8192 x 8192 product in the same precision. Weights "
        f"of two runs with `trainer.deterministic=true`: {', '.join(same)}. One image, CIFAR "
        f"stem, FP32, eager: {latency}."
    )


def origins(results: Results) -> str:
    """Return machine, versions and date."""
    places = dict.fromkeys(
        f"{x['gpu'] or x['cpu']}, torch {x['torch']}, {x['date']}, commit {str(x['commit'])[:10]}"
        for x in (result["environment"] for result in results.values())
    )
    return f"{'; '.join(places)}: {HOW}."


def _matching(results: Results, names: str) -> list[dict[str, Any]]:
    return [result for name, result in results.items() if fnmatch(name, names)]


def _accuracy(runs: list[dict[str, Any]], network: str) -> str:
    if not runs:
        return NOT_YET
    shares = [run["accuracy"][network] for run in runs]
    if len(shares) == 1:
        return f"{shares[0]:.2%} (1 seed)"
    return (
        f"{statistics.mean(shares):.2%} ({100 * min(shares):.2f} to {100 * max(shares):.2f}, "
        f"{len(shares)} seeds)"
    )


def _difference(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return NOT_YET
    points = [100 * (run["accuracy"]["int8"] - run["accuracy"]["fp32"]) for run in runs]
    if len(points) == 1:
        return f"{points[0]:+.2f} (1 seed)"
    half = t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / math.sqrt(len(points))
    return f"{statistics.mean(points):+.2f} ± {half:.2f}"


def _time(runs: list[dict[str, Any]]) -> str:
    return f"{statistics.mean(x['training']['seconds'] for x in runs):.0f} s"


def _memory(figures: dict[str, Any]) -> str:
    memory = figures["peak_bytes"]
    return f"{memory['reserved'] / 1e9:.1f} GB" if memory else "no GPU"


def _has_cuda(run: dict[str, Any]) -> bool:
    return "fp32_cuda" in run["latency_ms"]


if __name__ == "__main__":
    print(gpu_summary(load(Path(sys.argv[1]))))
