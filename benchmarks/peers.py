"""Quantize the same FP32 checkpoint with other tools, and compare accuracy and latency.

    python benchmarks/peers.py RUN    # a finished stage=qat or stage=ptq; needs the extra `peers`

NNCF's post-training quantization for OpenVINO and ONNX Runtime's static quantization calibrate on
the same images as stage=ptq. Accuracy is measured on the whole test set, latency with 1 image on 1
thread, all models in the same rounds. Every model has its normalization inside. The models for
OpenVINO have a fixed shape. Writes benchmarks/results/peers_<model>.json and .md.

Result, one run of 2 minutes on 2 cores of an AMD EPYC (Zen 5, VNNI), ResNet18 with ImageNet's stem
on CIFAR-10, PTQ for all: this project 0.148 ms and 82.78 %; ONNX Runtime's own quantization 0.142
ms and 82.90 %; NNCF 0.190 ms and 82.96 %. So this project is 4 % slower than the fastest tool, and
0.2 points below the most accurate tool, with an interval of 0.74. In OpenVINO, it takes 0.197 ms.
The other tools start from this project's cropped FP32 graph.

Settings that differ from the default of a tool:
- NNCF: only the preset in the rows `mixed`, and `subset_size` in the rows that name it.
- ONNX Runtime: activations are uint8, as `quantize_static` documents for x86 (its default is int8).
  Weights have a scale for each channel, as it advises for ResNets and as this project does. One row
  has its default, a scale for each tensor. `reduce_range` (7-bit weights) is its advice without
  VNNI.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytorch_lightning as pl
import torch
from finished_run import FinishedRun, Make, fp32_runtimes, int8_artifacts, of_file, read
from omegaconf import OmegaConf
from record import RESULTS, origin, origin_in_words, write
from torch import Tensor

from lightning_qat.deployment import runtimes
from lightning_qat.deployment.accuracy import accuracy, predict_test_set
from lightning_qat.deployment.description import KEY
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.deployment.onnx_export import save_onnx
from lightning_qat.errors import UserError
from lightning_qat.report.intervals import wilson
from lightning_qat.report.titles import fastest, title

STAGE = Path(__file__).parents[1] / "conf" / "stage" / "ptq.yaml"


class KeepImages(pl.LightningModule):
    """Train nothing, and keep the images."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep a batch of augmented images, the same as in calibration."""
        self.seen.append(batch[0].contiguous())

    def configure_optimizers(self) -> None:
        """Return None, because nothing is trained."""


def calibration_images(run: FinishedRun) -> Tensor:
    """Return the images of stage=ptq's calibration: float32 N x 3 x H x W in [0, 1]."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=OmegaConf.load(STAGE).trainer.limit_train_batches,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    keep = KeepImages()
    trainer.fit(keep, datamodule=run.datamodule)
    run.datamodule.trainer = None  # test images must not be augmented
    return torch.cat(keep.seen)


class AsItComes(runtimes.OpenVino):
    """OpenVINO without a precision hint: on some CPUs, it uses bfloat16 for floats."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__(path, threads)
        del self._settings["INFERENCE_PRECISION_HINT"]


def nncf_models(run: FinishedRun, images: Tensor, scratch: Path) -> dict[str, Make]:
    """Return each preset and size of calibration set, with and without a precision hint."""
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    single = nncf.Dataset(images.split(1), lambda image: image.numpy())
    makes: dict[str, Make] = {}
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        for subset_size in (300, len(images)):
            model = openvino.Core().read_model(scratch / "fp32.xml")
            model.reshape([1, *images.shape[1:]])
            quantised = nncf.quantize(model, single, preset=preset, subset_size=subset_size)
            quantised.set_rt_info(run.description.to_json(), [KEY])
            name = f"nncf_{preset.value}_{subset_size}"
            path = scratch / f"{name}.xml"
            openvino.save_model(quantised, path, compress_to_fp16=False)
            makes[f"{name}_f32"] = of_file(path)
            makes[name] = lambda threads, path=path: AsItComes(path, threads)
    return makes


def onnx_runtime_models(run: FinishedRun, images: Tensor, scratch: Path) -> dict[str, Make]:
    """Return each scheme that ONNX Runtime's documentation offers for x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(64))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quant_pre_process(scratch / "fp32.onnx", scratch / "preprocessed.onnx")
    makes: dict[str, Make] = {}
    for name, weight_type, per_channel, reduce_range in (
        ("u8s8", QuantType.QInt8, True, False),
        ("u8s8_reduce_range", QuantType.QInt8, True, True),
        ("u8s8_reduce_range_per_tensor", QuantType.QInt8, False, True),
        ("u8u8", QuantType.QUInt8, True, False),
    ):
        path = scratch / f"ort_{name}.onnx"
        quantize_static(
            scratch / "preprocessed.onnx",
            path,
            Images(),
            activation_type=QuantType.QUInt8,
            weight_type=weight_type,
            per_channel=per_channel,
            reduce_range=reduce_range,
        )
        save_onnx(onnx.load(path), path, run.description)
        makes[f"ort_{name}"] = of_file(path)
    return makes


def peers(run: FinishedRun, scratch: Path, skipped: dict[str, str]) -> dict[str, Make]:
    """Return all models by name, if their packages are installed."""
    images = calibration_images(run)
    makes = onnx_runtime_models(run, images, scratch)
    if find_spec("nncf") is None or find_spec("openvino") is None:
        skipped["nncf"] = "not installed: pip install 'lightning_qat[peers]'"
        return makes
    return nncf_models(run, images, scratch) | makes


def test_accuracy(run: FinishedRun, makes: dict[str, Make]) -> tuple[dict[str, float], int]:
    """Return the accuracy of each model, and the number of test images."""
    run.datamodule.setup("test")
    threads = torch.get_num_threads()
    logits, labels = predict_test_set(
        {name: make(threads) for name, make in makes.items()}, run.datamodule
    )
    return {name: accuracy(x, labels) for name, x in logits.items()}, len(labels)


def markdown(result: dict[str, Any]) -> str:
    """Return one row per model, the fastest first."""
    latency, shares = result["latency_ms"], result["accuracy"]
    best_fp32 = fastest(latency, "fp32")
    lines = [
        f"# Peers: {result['model']}",
        "",
        f"| | test accuracy | p50 ms | p95 ms | FP32 eager / it | {title(best_fp32)} / it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, x in sorted(latency.items(), key=lambda item: item[1]["p50"]):
        share = shares.get(name)
        low, high = wilson(share or 0, result["test_images"])
        lines.append(
            f"| {name} | {f'{share:.2%} ± {(high - low) / 2:.2%}' if share else ''} "
            f"| {x['p50']:.3f} | {x['p95']:.3f} "
            f"| {latency['fp32_eager']['p50'] / x['p50']:.1f}x "
            f"| {latency[best_fp32]['p50'] / x['p50']:.1f}x |"
        )
    lines += ["", *(f"- skipped: {name}, {why}" for name, why in result["skipped"].items()), ""]
    lines.append(
        "1 image, 1 thread, all in the same rounds. ±: 95 % binomial interval of "
        f"{result['test_images']} test images. lightning_qat: `int8_*`. "
        "`nncf_<preset>_<images>`: NNCF's "
        "post-training quantization, calibrated on so many images; `_f32`: run with "
        "INFERENCE_PRECISION_HINT=f32, else as OpenVINO comes. `ort_*`: ONNX Runtime's static "
        f"quantization. {origin_in_words(result)}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Quantize, test, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the directory of a finished stage=qat or ptq")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds at most")
    parser.add_argument("--out", type=Path, help="without suffix; gets .json and .md")
    args = parser.parse_args()
    run, skipped = read(args.run), {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        fp32 = fp32_runtimes(run, scratch, skipped)
        quantised = int8_artifacts(run, skipped) | peers(run, scratch, skipped)
        for name, why in skipped.items():
            print(f"skipped: {name}, {why}")
        shares, test_images = test_accuracy(run, {"fp32_eager": fp32["fp32_eager"]} | quantised)
        images = torch.rand(1, 3, *[run.datamodule.image_size] * 2)
        fresh = {name: make(1) for name, make in (fp32 | quantised).items()}
        latency = measure_latency(fresh, images, args.rounds, seconds=args.seconds)
    result = {
        "model": run.description.model,
        "accuracy": shares,
        "test_images": test_images,
        "latency_ms": latency,
        "skipped": skipped,
        **origin(),
    }
    write(result, markdown(result), args.out or RESULTS / f"peers_{run.description.model}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
