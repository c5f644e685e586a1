"""report.html: the results of a run, on one page that needs no other file.

This module collects the facts, and report.html.j2 holds the text.
"""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from lightning_qat.deployment.accuracy import identical
from lightning_qat.deployment.evidence import Evidence
from lightning_qat.report import plots, titles
from lightning_qat.report.beside import Curve, command_for, find_ptq, read_curves
from lightning_qat.report.intervals import paired_difference, unpaired_noise, wilson
from lightning_qat.report.render import write_page

FILE_NAME = "report.html"

_COLOURS = {"fp32": "fp32", "fake_quant": "fake-quant"}  # all other networks are INT8
_PAIRS = [  # a network and the network that it should agree with
    ("onnx", "fake_quant"),
    ("int8", "fake_quant"),
    ("openvino", "fake_quant"),
    ("onnx", "int8"),
    ("int8", "fp32"),
]
_MOST_CONFUSED = 10


def write_report(metrics: dict[str, Any], evidence: Evidence, folder: Path) -> None:
    """Write ``folder/report.html``. After an error, the old file is unchanged.

    The page also shows the training curves in ``folder/csv`` and, for a QAT run, the newest
    finished PTQ run of the same network in the same output folder.

    Args:
        metrics: the content of the run's metrics.json.
        evidence: the data of the test set.
        folder: the folder of the run.
    """
    # The names in a folder of images may be invalid UTF-8.
    names = [x.encode("utf-8", "backslashreplace").decode() for x in evidence.class_names]
    evidence = replace(evidence, class_names=names)
    ptq = find_ptq(metrics, folder) if metrics["stage"] == "qat" else None
    write_page(
        folder / FILE_NAME,
        "report.html.j2",
        metrics=metrics,
        evidence=evidence,
        quantized="int8" in metrics["accuracy"],
        verdict=_verdict(metrics, evidence),
        accuracy=_accuracy(metrics, evidence, ptq),
        ptq=_compare(metrics, ptq) if ptq else None,
        command_for=lambda stage: command_for(stage, metrics),
        latency=_latency(metrics),
        curves=_curves(folder),
        size_plot=_size_plot(metrics, evidence),
        agreement=_agreement(evidence),
        layer_plot=plots.layers(evidence.layers) if evidence.layers else None,
        most_layers=plots.MOST_LAYERS,
        confusion=_confusion(evidence),
        samples=_samples(evidence),
    )


def _verdict(metrics: dict[str, Any], evidence: Evidence) -> dict[str, Any]:
    """Return the figures of the first sentences."""
    latency, size = metrics["latency_ms"], metrics["size_bytes"]
    best_fp32 = titles.fastest(latency, "fp32")
    best_int8 = titles.fastest(latency, "int8")
    verdict: dict[str, Any] = {"best_fp32": best_fp32, "best_int8": best_int8}
    if "int8" in metrics["accuracy"]:
        verdict |= {
            "difference": metrics["accuracy"]["int8"] - metrics["accuracy"]["fp32"],
            "interval": _paired(evidence, "int8"),
            "smaller": size["fp32"] / size["int8"],
        }
    if best_int8:
        fast = latency[best_int8]["p50"]
        verdict |= {
            "milliseconds": fast,
            "over_eager": latency["fp32_eager"]["p50"] / fast,
            "over_best": latency[best_fp32]["p50"] / fast,
            "accuracy": metrics["accuracy"][_measured(metrics, best_int8)],
            "file": next(
                (x for x in evidence.files if x["runtime"] == titles.runtime(best_int8)), None
            ),
        }
    return verdict


def _measured(metrics: dict[str, Any], key: str) -> str:
    """Return the network whose accuracy a runtime has: its own if measured, else fp32 or int8."""
    network = titles.network(key)
    return network if network in metrics["accuracy"] else titles.precision(key)


def _accuracy(
    metrics: dict[str, Any], evidence: Evidence, ptq: tuple[Path, dict[str, Any]] | None
) -> dict[str, Any]:
    images = metrics["test_images"]
    method = {"ptq": "PTQ ", "qat": "QAT "}.get(metrics["stage"], "")
    rows = []
    for network, share in metrics["accuracy"].items():
        name = titles.NETWORKS.get(network, network)
        rows.append(
            {
                "name": name if network == "fp32" else method + name,
                "colour": _COLOURS.get(network, "int8"),
                "share": share,
                "ends": wilson(share, images),
                "difference": share - metrics["accuracy"]["fp32"],
                "interval": _paired(evidence, network),
            }
        )
    if ptq:
        share = ptq[1]["accuracy"]["int8"]
        row = {"name": "PTQ INT8", "colour": "ptq", "share": share, "interval": None}
        row |= {"ends": wilson(share, images), "difference": share - rows[0]["share"]}
        rows.insert(1, row)
    names, colours = [row["name"] for row in rows], [row["colour"] for row in rows]
    shares = [(row["share"], *row["ends"]) for row in rows]
    return {"rows": rows, "plot": plots.accuracy(names, colours, shares)}


def _paired(evidence: Evidence, network: str) -> tuple[float, float] | None:
    """Return the interval of the accuracy difference to FP32, or None if no answers are known."""
    if network == "fp32" or network not in evidence.logits:
        return None
    return paired_difference(_right(evidence, network), _right(evidence, "fp32"))


def _right(evidence: Evidence, network: str) -> Tensor:
    return evidence.logits[network].argmax(1) == evidence.labels


def _compare(metrics: dict[str, Any], ptq: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    ours, theirs = metrics["accuracy"]["int8"], ptq[1]["accuracy"]["int8"]
    return {
        "folder": ptq[0],
        "share": theirs,
        "difference": ours - theirs,
        "noise": unpaired_noise(ours, theirs, metrics["test_images"]),
    }


def _latency(metrics: dict[str, Any]) -> dict[str, Any]:
    latency = metrics["latency_ms"]
    rows = [
        {"title": titles.title(key), "over_eager": latency["fp32_eager"]["p50"] / x["p50"], **x}
        for key, x in latency.items()
    ]
    shares = {}
    for key in latency:
        share = metrics["accuracy"][_measured(metrics, key)]
        shares[titles.network(key)] = (share, *wilson(share, metrics["test_images"]))
    return {
        "rows": rows,
        "slower": titles.slower_in_int8(latency),
        "plot": plots.latency(latency),
        "scatter": plots.accuracy_latency(latency, shares),
    }


def _curves(folder: Path) -> list[dict[str, Any]]:
    logged = read_curves(folder)
    if len(logged.get("train/loss", ([], []))[0]) < 2 and "val/loss" not in logged:
        return []  # calibration: one epoch without training
    drawn = []
    for title, names in {
        "loss": ["train/loss", "val/loss"],
        "accuracy": ["train/accuracy", "val/accuracy"],
        "learning rate": _learning_rates(logged),
    }.items():
        lines = {name: logged[name] for name in names if name in logged}
        if lines:
            drawn.append({"title": title.capitalize(), "plot": plots.curves(title, lines)})
    return drawn


def _learning_rates(logged: dict[str, Curve]) -> list[str]:
    """Return one name per curve. Weights, biases and batch-norm share a curve; scales do not."""
    names: list[str] = []
    for name in logged:
        if name.startswith("lr-") and all(logged[name] != logged[other] for other in names):
            names.append(name)
    return names


def _size_plot(metrics: dict[str, Any], evidence: Evidence) -> Markup:
    rows = [("FP32 TorchScript", "fp32", metrics["size_bytes"]["fp32"])]
    rows += [(f"INT8 {x['runtime']}", "int8", x["bytes"]) for x in evidence.files]
    return plots.sizes(rows)


def _agreement(evidence: Evidence) -> list[dict[str, Any]]:
    rows = []
    for network, other in _PAIRS:
        if network not in evidence.logits or other not in evidence.logits:
            continue
        logits, others = evidence.logits[network], evidence.logits[other]
        differ = int((logits.argmax(1) != others.argmax(1)).sum())
        rows.append(
            {
                "pair": f"{titles.NETWORKS[network]} and {titles.NETWORKS[other]}",
                "share": 1 - differ / len(logits),
                "differ": differ,
                "identical": identical(logits, others),
                "largest": float((logits - others).abs().max()),
            }
        )
    return rows


def _confusion(evidence: Evidence) -> dict[str, Any]:
    network = "int8" if "int8" in evidence.logits else "fp32"
    names = evidence.class_names
    classes = len(names)
    pairs = evidence.labels * classes + evidence.logits[network].argmax(1)
    matrix = pairs.bincount(minlength=classes**2).view(classes, classes)
    mistakes = matrix - matrix.diag().diag()
    counts, places = mistakes.flatten().sort(descending=True, stable=True)
    return {
        "network": titles.NETWORKS[network],
        "plot": plots.confusion(matrix, names) if classes <= plots.MOST_CLASSES else None,
        "worst": [
            {"label": names[place // classes], "prediction": names[place % classes], "count": count}
            for place, count in zip(
                *(x[:_MOST_CONFUSED].tolist() for x in (places, counts)), strict=True
            )
            if count
        ],
    }


def _samples(evidence: Evidence) -> dict[str, Any] | None:
    """Return the images on which FP32 and INT8 disagree, and count which network is right."""
    if "int8" not in evidence.logits:
        return None
    predictions = {name: evidence.logits[name].argmax(1) for name in ("fp32", "int8")}
    differ = predictions["fp32"] != predictions["int8"]
    shown = []
    for image, index in zip(evidence.samples, evidence.sample_indices.tolist(), strict=True):
        answers = {
            name: (evidence.class_names[x], float(evidence.logits[name][index].softmax(0)[x]))
            for name, x in ((name, int(x[index])) for name, x in predictions.items())
        }
        label = evidence.class_names[int(evidence.labels[index])]
        shown.append({"index": index, "png": _png(image), "label": label, **answers})
    return {
        "count": int(differ.sum()),
        "fp32_right": int((differ & _right(evidence, "fp32")).sum()),
        "int8_right": int((differ & _right(evidence, "int8")).sum()),
        "shown": shown,
        "small": evidence.samples.shape[-1] < 128,  # the page enlarges it
    }


def _png(image: Tensor) -> str:
    """Return the image, 3 x H x W in [0, 1], as a data URI."""
    file = io.BytesIO()
    pixels = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    Image.fromarray(pixels.numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
