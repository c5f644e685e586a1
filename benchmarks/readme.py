"""Write the tables and the plot of README.md and docs/ from the files in benchmarks/results/.

Each table stands between two comments with its name, in the page that has them.

After a measurement on a quiet machine:

    python benchmarks/networks.py
    python benchmarks/latency.py outputs/multiruns/<time>/<job>
    python benchmarks/peers.py outputs/multiruns/<time>/<job>
    python benchmarks/training.py
    python benchmarks/gpu/collect.py FOLDER    # see benchmarks/gpu/README.md
    cp outputs/multiruns/<time>/<job>/metrics.json benchmarks/results/<name>/<stage>.json
    python benchmarks/readme.py
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import networks_table
import tables_gpu
from record import full_table, origin_in_words
from tables_training import training_summary

from lightning_qat.report.intervals import wilson
from lightning_qat.report.titles import fastest, runtime, title

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "accuracy_latency.svg"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """metrics.json by result folder and stage; `ptq` and `qat` are there in each."""
    return {
        folder.name: {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
        for folder in sorted(RESULTS.iterdir())
        if (folder / "qat.json").is_file()
    }


def summary(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of the README: what a user gets."""
    lines = [
        "| ResNet18 | network | test accuracy | file | fastest runtime "
        "| speed-up over PyTorch FP32, eager | speed-up over the fastest FP32 runtime |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, stages in results.items():
        for row, stage, network in ROWS:
            label = _label(name) if row == "FP32" else ""
            lines.append(f"| {label} | {row} | {' | '.join(_cells(stages[stage], network))} |")
    return "\n".join([*lines, "", *_notes(results)])


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The same with the agreement between the runtimes."""
    lines = [
        "| ResNet18 | | test accuracy | agreement | size | fastest | FP32 eager = 1 "
        "| best FP32 = 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, stages in results.items():
        for row, stage, network in ROWS:
            accuracy, *others = _cells(stages[stage], network)
            agreement = ""
            if network == "int8":
                shares = stages[stage]["agreement"].values()
                agreement = " / ".join(f"{share:.2%}" for share in shares)
            label = _label(name) if row == "FP32" else ""
            cells = " | ".join([accuracy, agreement, *others])
            lines.append(f"| {label} | {row} | {cells} |")
    return "\n".join([*lines, "", *_notes(results)])


LABELS = {"cifar10_imagenet_stem": "CIFAR-10, ImageNet stem"}
ROWS = [("FP32", "qat", "fp32"), ("PTQ INT8", "ptq", "int8"), ("QAT INT8", "qat", "int8")]


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _notes(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One sentence a result: seed, epochs, machine, versions, date and command."""
    notes = []
    for name, stages in results.items():
        qat = stages["qat"]
        where = qat["environment"]
        notes.append(
            f"{_label(name)}: seed {qat['seed']}, {stages['fp32']['epochs']} FP32 and "
            f"{qat['epochs']} QAT epochs, {where['cpu']} "
            f"({'with' if where['vnni'] else 'without'} VNNI), torch "
            f"{where['torch']}, {where['date']}, commit {where['commit'][:10]}: "
            f"`{_all_stages(qat['command'])}`."
        )
    return notes


def _cells(metrics: dict[str, Any], network: str) -> list[str]:
    """Accuracy, size, fastest runtime and its two speed-ups."""
    accuracy = metrics["accuracy"][network]
    low, high = wilson(accuracy, metrics["test_images"])
    latency = metrics["latency_ms"]
    best = _fastest(metrics, network)
    best_fp32 = _fastest(metrics, "fp32")
    return [
        f"{accuracy:.2%} ± {(high - low) / 2:.2%}",
        f"{metrics['size_bytes'][network] / 1e6:.1f} MB",
        runtime(best),
        f"{latency['fp32_eager']['p50'] / latency[best]['p50']:.1f}x",
        f"{latency[best_fp32]['p50'] / latency[best]['p50']:.1f}x",
    ]


def _fastest(metrics: dict[str, Any], network: str) -> str:
    best = fastest(metrics["latency_ms"], network)
    assert best is not None
    return best


def _all_stages(command: str) -> str:
    return command.replace("stage=qat", "stage=fp32,ptq,qat").replace("train.py", "train.py -m")


def plot(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Accuracy against speed, with the binomial interval."""
    plt.rcParams["svg.hashsalt"] = "lightning_qat"  # the same picture for the same figures
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, stages in results.items():
        for (row, stage, network), marker in zip(ROWS, "osD", strict=True):
            metrics = stages[stage]
            accuracy = metrics["accuracy"][network]
            low, high = wilson(accuracy, metrics["test_images"])
            latency = metrics["latency_ms"]
            axes.errorbar(
                latency["fp32_eager"]["p50"] / latency[_fastest(metrics, network)]["p50"],
                100 * accuracy,
                yerr=[[100 * (accuracy - low)], [100 * (high - accuracy)]],
                marker=marker,
                capsize=3,
                label=f"{row}, {_label(name)}",
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("speed-up of the fastest runtime over PyTorch FP32, eager (1 image, 1 thread)")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(ROWS), fontsize="x-small")
    figure.savefig(PLOT, metadata={"Date": None})


def networks_summary() -> str:
    """The networks that people use: which work, and how exact they are."""
    result = json.loads((RESULTS / "networks.json").read_text())
    text = networks_table.summary(result["networks"])
    return f"{text}\n\n{origin_in_words(result)} {full_table(RESULTS / 'networks.json')}"


def latency_summary() -> str:
    """The fastest artifact for each batch size and number of threads, of each model."""
    parts = []
    for file in sorted(RESULTS.glob("latency_*.json")):
        result = json.loads(file.read_text())
        parts += [
            f"| {result['model']} | " + " | ".join(_cell_head(x) for x in result["cells"]) + " |",
            "| --- |" + " --- |" * len(result["cells"]),
            "| fastest | " + " | ".join(_fastest_in(x) for x in result["cells"]) + " |",
            "| FP32 eager = 1 | " + _ratios(result, "over_fp32_eager") + " |",
            "| best FP32 = 1 | " + _ratios(result, "over_best_fp32") + " |",
            "",
            f"{origin_in_words(result)} {full_table(file)}\n",
        ]
    return "\n".join(parts).rstrip()


def _cell_head(cell: dict[str, Any]) -> str:
    threads = cell["threads"]
    return f"batch {cell['batch']}, {threads} thread{'s' if threads > 1 else ''}"


def _fastest_in(cell: dict[str, Any]) -> str:
    return title(cell["recommendation"]["artifact"])


def _ratios(result: dict[str, Any], name: str) -> str:
    return " | ".join(f"{cell['recommendation'][name]:.1f}x" for cell in result["cells"])


def peers_summary() -> str:
    """lightning_qat, and the fastest and the most accurate of each peer, of each model."""
    parts = []
    for file in sorted(RESULTS.glob("peers_*.json")):
        result = json.loads(file.read_text())
        latency, shares = result["latency_ms"], result["accuracy"]
        best_fp32 = fastest(latency, "fp32")
        parts += [
            f"| {result['model']}, 1 image, 1 thread | test accuracy | FP32 eager = 1 "
            "| best FP32 = 1 |",
            "| --- | --- | --- | --- |",
        ]
        for whose, prefix in (
            ("lightning_qat", "int8"),
            ("NNCF PTQ", "nncf"),
            ("ONNX Runtime PTQ", "ort"),
        ):
            names = [name for name in latency if name.startswith(prefix)]
            by_speed = min(names, key=lambda name: latency[name]["p50"])
            by_accuracy = max(names, key=lambda name: shares[name])
            for what, name in (("fastest", by_speed), ("most accurate", by_accuracy)):
                speed = latency[name]["p50"]
                parts.append(
                    f"| {whose}, {what}: `{name}` | {shares[name]:.2%} "
                    f"| {latency['fp32_eager']['p50'] / speed:.1f}x "
                    f"| {latency[best_fp32]['p50'] / speed:.1f}x |"
                )
        parts += [
            "",
            f"{origin_in_words(result)} {full_table(file)}\n",
        ]
    return "\n".join(parts).rstrip()


def blocks() -> dict[str, str]:
    """Return what stands in the pages between ``<!-- name -->`` and ``<!-- /name -->``."""
    results = load()
    return {
        "summary": summary(results),
        "results": table(results),
        "latency": latency_summary(),
        "peers": peers_summary(),
        "training": training_summary(),
        "gpu": tables_gpu.gpu_summary(tables_gpu.load(RESULTS / "gpu")),
        "bit_for_bit": (RESULTS / "bit_for_bit.md").read_text().rstrip(),
        "networks": networks_summary(),
        "few_bits": (RESULTS / "few_bits.md").read_text().rstrip(),
        "distill": (RESULTS / "distill.md").read_text().rstrip(),
    }


def main() -> None:
    """Write each block into the page that has its comments."""
    for page in PAGES:
        text = page.read_text()
        for name, content in blocks().items():
            text = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                lambda match, content=content: f"{match[1]}{content}\n{match[2]}",
                text,
                flags=re.DOTALL,
            )
        page.write_text(text)
    plot(load())


if __name__ == "__main__":
    main()
