"""Finished runs in the form of train.py, with an untrained network."""

import json
from pathlib import Path
from typing import Any

import torch

from lightning_qat.deployment.evidence import Evidence

LAYERS = ["conv1", *(f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2))]
IMAGES = 2000


def make_run(
    stage: str, folder: Path, class_names: list[str] | None = None
) -> tuple[dict[str, Any], Evidence]:
    """Return metrics and evidence of one run. Write its metrics.json and curves to `folder`."""
    class_names = class_names or [str(digit) for digit in range(10)]
    evidence = make_evidence(stage, class_names)
    metrics: dict[str, Any] = {
        "status": 0,
        "stage": stage,
        "data": "digits",
        "model": "resnet18",
        "qconfig": None if stage == "fp32" else "x86",
        "seed": 0,
        "epochs": {"fp32": 8, "ptq": 0, "qat": 4}[stage],
        "training": {"seconds": 90.0},
        "accuracy": {
            name: float((logits.argmax(1) == evidence.labels).double().mean())
            for name, logits in evidence.logits.items()
        },
        "test_images": IMAGES,
        "size_bytes": {"fp32": 44_693_237}
        | ({} if stage == "fp32" else {"int8": 11_296_676, "int8_packed": 5_640_160}),
        "latency_ms": {
            key: {"p50": p50, "p95": 1.1 * p50}
            for key, p50 in {
                "fp32_eager": 3.76,
                "fp32_torchscript": 3.05,
                "fp32_onnx": 2.41,
                "fp32_openvino": 2.2,
                "int8_eager": 1.48,
                "int8_torchscript": 0.6,
                "int8_onnx": 0.71,
                "int8_openvino": 0.55,
            }.items()
            if stage != "fp32" or key.startswith("fp32")
        },
        "command": f"python train.py stage={stage} data=digits",
        "weights_sha256": None if stage == "fp32" else 64 * "0",
        "environment": {  # in the form of `environment`
            "torch": "2.15.0+cu132",
            "python": "3.11.7",
            "cpu": "AMD EPYC",
            "vnni": True,
            "isa": "AVX-512 VNNI",
            "threads": 2,
            "gpu": None,
            "commit": "ef7ec3205a6a3ec9058ee98863c3106431bdf1d8",
            "date": "2026-11-23",
        },
    }
    if stage != "fp32":
        metrics["activation_range"] = {"quant_max": 127, "why": "pair sums of AVX2 would saturate."}
    (folder / "csv").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if stage != "ptq":
        (folder / "csv" / "metrics.csv").write_text(_curves())
    return metrics, evidence


def make_evidence(stage: str, class_names: list[str]) -> Evidence:
    """Return logits that are right on about nine images in ten, and nearly the same in INT8."""
    torch.manual_seed(0)
    classes = len(class_names)
    labels = torch.randint(classes, (IMAGES,))
    fp32 = torch.randn(IMAGES, classes)
    fp32[torch.arange(IMAGES), labels] += 4
    if stage == "fp32":
        nothing = torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)
        return Evidence(class_names, labels, {"fp32": fp32}, *nothing, [], [], [])
    int8 = fp32 + 0.1 * torch.randn_like(fp32)
    logits = {"fp32": fp32, "fake_quant": int8, "int8": int8.clone()}
    logits |= {"onnx": int8 + 0.001, "openvino": int8 + 0.01 * torch.randn_like(int8)}
    where = (fp32.argmax(1) != int8.argmax(1)).nonzero().flatten()[:24]
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": "ConvReLU2d",
            # None = a layer with only zeros as output
            "sqnr_db": 24.0 + rank / 2 if rank > 1 else None,
            "own_sqnr_db": 30 + rank if rank else None,
            "weight_min": -0.31,
            "weight_max": 0.42,
            "activation_min": 0.0,
            "activation_max": 3.7,
            "clipped": 0.0012,
        }
        for rank, name in enumerate(LAYERS)
    ]
    layers[3] |= {"kind": "add_relu", "weight_min": None, "weight_max": None}
    files = [
        {
            "name": f"model_int8.{suffix}",
            "bytes": 11_296_676,
            "runtime": runtime,
            "how_to_load": f"import torch\nmodel = load('model_int8.{suffix}')\nlogits = model(x)",
            "classes": class_names,
            "commit": "ef7ec32",
        }
        for suffix, runtime in (
            ("ts", "TorchScript"),
            ("onnx", "ONNX Runtime"),
            ("xml", "OpenVINO"),
        )
    ]
    loud = ["OpenVINO agrees with INT8 on 99.40 % of the images, less than 99.50 %."]
    return Evidence(class_names, labels, logits, torch.rand(len(where), 3, 8, 8), where,
                    layers, files, loud)  # fmt: skip


def _curves() -> str:
    lines = ["epoch,lr-SGD,step,train/accuracy,train/loss,val/accuracy,val/loss"]
    for epoch in range(4):
        step = 40 * (epoch + 1)
        lines += [
            f",{0.005 / (epoch + 1)},{step - 10},,,,",
            f"{epoch},,{step},,,{0.9 + epoch / 50},{0.3 / (epoch + 1)}",
            f"{epoch},,{step},{0.9 + epoch / 40},{0.4 / (epoch + 1)},,",
        ]
    return "\n".join(lines) + "\n"
