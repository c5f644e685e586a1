"""Write the README's table, plot and torchvision summary from the files in benchmarks/results/.

After a measurement on a quiet machine:

    python benchmarks/torchvision_models.py
    cp outputs/multiruns/<time>/<job>/metrics.json benchmarks/results/<name>/<stage>.json
    python benchmarks/readme.py
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from lightning_qat.report.table import sigma

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = RESULTS / "accuracy_latency.svg"


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """metrics.json by result folder and stage; `ptq` and `qat` are there in each."""
    return {
        folder.name: {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
        for folder in sorted(RESULTS.iterdir())
        if folder.is_dir()
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row for each network of each result, FP32 first."""
    lines = [
        "| ResNet18 | | test accuracy | agreement with fake-quant | size | 1 image, 1 thread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for name, stages in results.items():
        label = name.replace("_", " ")
        for title, stage, network in ROWS:
            lines.append(_row(stages[stage], label if title == "FP32" else "", title, network))
        qat = stages["qat"]
        where = qat["environment"]
        notes.append(
            f"{label}: seed {qat['seed']}, {stages['fp32']['epochs']} FP32 and {qat['epochs']} QAT "
            f"epochs, {where['cpu']} ({'with' if where['vnni'] else 'without'} VNNI), torch "
            f"{where['torch']}, {where['date']}, commit {where['commit'][:10]}: "
            f"`{_whole_road(qat['command'])}`."
        )
    return "\n".join([*lines, "", *notes])


ROWS = [("FP32", "qat", "fp32"), ("PTQ INT8", "ptq", "int8"), ("QAT INT8", "qat", "int8")]


def _row(metrics: dict[str, Any], name: str, title: str, network: str) -> str:
    accuracy, images = metrics["accuracy"][network], metrics["test_images"]
    interval = 1.96 * sigma(accuracy, images)
    latency = metrics["latency_ms"]
    # within one run, against the FP32 network as PyTorch runs it: eager
    ratio = latency["fp32_eager"]["p50"] / latency[_runtime(network)]["p50"]
    agreement = f"{metrics['agreement']['int8_vs_fake_quant']:.2%}" if network == "int8" else ""
    return (
        f"| {name} | {title} | {accuracy:.2%} ± {interval:.2%} | {agreement} "
        f"| {metrics['size_bytes'][network] / 1e6:.1f} MB | {ratio:.1f}x |"
    )


def _runtime(network: str) -> str:
    return "fp32_eager" if network == "fp32" else "int8_torchscript"


def _whole_road(command: str) -> str:
    return command.replace("stage=qat", "stage=fp32,ptq,qat").replace("train.py", "train.py -m")


def plot(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Accuracy against speed, with the binomial interval."""
    plt.rcParams["svg.hashsalt"] = "lightning_qat"  # the same picture for the same figures
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, stages in results.items():
        for (title, stage, network), marker in zip(ROWS, "osD", strict=True):
            metrics = stages[stage]
            accuracy = metrics["accuracy"][network]
            latency = metrics["latency_ms"]
            axes.errorbar(
                latency["fp32_eager"]["p50"] / latency[_runtime(network)]["p50"],
                100 * accuracy,
                yerr=196 * sigma(accuracy, metrics["test_images"]),
                marker=marker,
                capsize=3,
                label=f"{title}, {name.replace('_', ' ')}",
            )
    axes.set_xlabel("speed at 1 image on 1 thread, FP32 eager = 1")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(PLOT, metadata={"Date": None})


def torchvision_summary() -> str:
    """How many of torchvision's networks go through, and how much faster they are."""
    rows = json.loads((RESULTS / "torchvision_models.json").read_text())
    good = [row for row in rows.values() if "error" not in row]
    latencies = [{name: x["p50"] for name, x in row["latency_ms"].items()} for row in good]
    ratios = [x["fp32_torchscript"] / x["int8_torchscript"] for x in latencies]
    where = good[0]["environment"]
    share = min(row["integer"] / row["layers"] for row in good)
    layers = "all" if share == 1 else f"at least {share:.0%}"
    return (
        f"Of torchvision's {len(rows)} convolutional classification networks, {len(good)} go "
        f"through unmodified, with {layers} of their convolutions and linear layers as integer "
        f"modules; the INT8 TorchScript file is {statistics.median(ratios):.1f} times as fast as "
        f"the FP32 one in the median ({min(ratios):.1f} to {max(ratios):.1f}; 1 image, 1 thread, "
        f"random weights, seed 0, {where['cpu']} {'with' if where['vnni'] else 'without'} VNNI, "
        f"torch {where['torch']}, {where['date']}: `python benchmarks/torchvision_models.py`). "
        "[Network by network](benchmarks/results/torchvision_models.md)."
    )


def main() -> None:
    """Put all of it where the README has it."""
    results = load()
    readme = ROOT / "README.md"
    text = readme.read_text()
    for mark, content in (("results", table(results)), ("torchvision", torchvision_summary())):
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda match, content=content: f"{match[1]}{content}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
    readme.write_text(text)
    plot(results)


if __name__ == "__main__":
    main()
