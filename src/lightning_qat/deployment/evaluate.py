"""Measure the networks of a run."""

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.atomic import PARTIAL
from lightning_qat.data.image_datamodule import ImageDataModule
from lightning_qat.deployment.accuracy import (
    accuracy,
    agreement,
    identical,
    predict_test_set,
    shortfalls,
    validate,
)
from lightning_qat.deployment.deployed import DeployedModel, PixelModel
from lightning_qat.deployment.description import PIXELS, UNIT, Description
from lightning_qat.deployment.evidence import Evidence
from lightning_qat.deployment.export import ExportedFile, export
from lightning_qat.deployment.latency import measure_latency
from lightning_qat.deployment.openvino_export import is_installed
from lightning_qat.deployment.runtimes import Runtime, load
from lightning_qat.quantization.damage import layer_damage
from lightning_qat.quantization.packed import activation_range, packed_bytes
from lightning_qat.quantization.torch_model import quantized_engine

log = logging.getLogger(__name__)

LAYER_IMAGES = 256  # largest number of training images for the damage of each layer
SAMPLES = 24  # pictures in the report
_FILE_KEYS = {"torchscript": "int8", "onnx": "onnx", "openvino": "openvino"}


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Let integer kernels run if ``trainer.deterministic`` is set.

    torch would refuse a resize in these kernels, although they always give the same numbers.
    """
    asked = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warn_only)


@_any_algorithm()
def evaluate(
    networks: dict[str, nn.Module],
    datamodule: ImageDataModule,
    folder: Path,
    run: dict[str, Any],
    uint8_input: bool,
    latency_seconds: float,
    export_onnx: bool,
) -> tuple[dict[str, Any], Evidence]:
    """Export to ``folder`` and measure: accuracy, agreement, sizes, latency, damage by layer.

    The accuracy of a file is measured with that file after loading, and is then written into it.

    Args:
        networks: ``fp32`` and, after quantization, ``fake_quant`` and ``int8``.
        datamodule: data module after ``setup``.
        folder: receives ``model_int8.ts``, ``.onnx`` and, if OpenVINO is installed, ``.xml``.
        run: entries of metrics.json that are known before the measurement.
        uint8_input: also export models for raw pixels: ``model_int8_uint8.*``.
        latency_seconds: time limit of the timing. At least a few rounds are always timed.
        export_onnx: False = export no ONNX and OpenVINO files, also not of the FP32 network.

    Returns:
        The figures for metrics.json, and the evidence for the report.
    """
    models: dict[str, Any] = {
        name: DeployedModel(net, datamodule.mean, datamodule.std) for name, net in networks.items()
    }
    images = _first_images(datamodule, datamodule.test_dataloader(), 2)
    one_image = images[:1].contiguous()  # the memory layout of a user's image
    description = _describe(run, datamodule, networks.get("int8"))
    files: dict[str, ExportedFile] = {}
    warnings: list[str] = []
    if "int8" in models:
        stem = folder / "model_int8"
        exported = export(models["fake_quant"], stem, description, images, warnings, export_onnx)
        if export_onnx and not is_installed():
            log.info(
                "OpenVINO is not installed, so model_int8.xml is not written: to get it, pip "
                "install 'lightning_qat[openvino]'."
            )
        files = {_FILE_KEYS[name]: file for name, file in exported.items()}
    # The folder is inside the run's folder, so that it is deleted even if this process is killed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=PARTIAL) as scratch:
        stem = Path(scratch) / "model_fp32"
        fp32_files = export(models["fp32"], stem, description, images, warnings, export_onnx)
        if uint8_input and files:
            files |= _export_for_pixels(
                models["fake_quant"], datamodule, folder, description, warnings, export_onnx
            )
        tested = {name: model for name, model in models.items() if name != "int8"}
        # Load one copy per use: oneDNN's convolutions are fast only for the first batch size they
        # see.
        tested |= {name: _taking_floats(load(file.path)) for name, file in files.items()}
        logits, labels = predict_test_set(tested, datamodule)
        both = {name: model for name, model in tested.items() if name in ("fp32", "int8")}
        validation = validate(both, datamodule)
        timed = _timed(models, fp32_files, files)
        latency_ms = measure_latency(timed, one_image, seconds=latency_seconds)

    accuracies = {name: accuracy(x, labels) for name, x in logits.items()}
    for name, file in files.items():
        file.state_accuracy(accuracies[name])
    figures: dict[str, Any] = {
        "accuracy": accuracies,
        "test_images": len(labels),
        "size_bytes": {"fp32": fp32_files["torchscript"].bytes}
        | {name: file.bytes for name, file in files.items()},
        "latency_ms": latency_ms,
    }
    if validation:
        figures["validation"] = validation
    layers: list[dict[str, Any]] = []
    unlike = torch.empty(0, dtype=torch.int64)
    if files:
        trained = logits["fake_quant"]
        figures["agreement"] = {
            f"{name}_vs_fake_quant": agreement(logits[name], trained) for name in files
        }
        figures["bit_identical"] = {
            f"{name}_vs_fake_quant": identical(logits[name], trained) for name in files
        }
        if "onnx" in files:
            figures["agreement"]["onnx_vs_int8"] = agreement(logits["onnx"], logits["int8"])
        figures["size_bytes"]["int8_packed"] = packed_bytes(networks["fake_quant"])
        figures["activation_range"] = activation_range(networks["fake_quant"])
        warnings += shortfalls(accuracies, figures["agreement"], len(labels))
        if figures["activation_range"]["saturates"]:
            warnings.append(
                "the scheme uses all 8 bits and this CPU has no VNNI: sums saturate in the kernels "
                "of ONNX Runtime, OpenVINO and oneDNN. Use qconfig=x86 for this CPU."
            )
        unlike = (logits["fp32"].argmax(1) != logits["int8"].argmax(1)).nonzero().flatten()
        # Use training images, because the test set must not influence a choice.
        images = _first_images(datamodule, datamodule.train_dataloader(), LAYER_IMAGES)
        images = models["fp32"].normalize(images)
        layers = layer_damage(networks["fake_quant"], images)
    for warning in warnings:
        log.warning(warning)
    return figures, Evidence(
        class_names=datamodule.class_names,
        labels=labels,
        logits=logits,
        samples=datamodule.test_images(unlike[:SAMPLES]),
        sample_indices=unlike[:SAMPLES],
        layers=layers,
        files=[
            {
                "name": file.path.name,
                "bytes": file.bytes,
                "runtime": file.runtime,
                "how_to_load": file.how_to_load,
                "input": file.description.input,
                "accuracy": file.description.accuracy,
            }
            for file in files.values()
        ],
        warnings=warnings,
    )


def _describe(run: dict[str, Any], datamodule: ImageDataModule, int8: Any | None) -> Description:
    return Description(
        classes=datamodule.class_names,
        image_size=datamodule.image_size,
        input=UNIT,
        max_value=datamodule.max_value,
        mean=list(datamodule.mean),
        std=list(datamodule.std),
        stage=run["stage"],
        data=run["data"],
        model=run["model"],
        qconfig=run["qconfig"],
        engine=int8.engine if int8 is not None else None,
        seed=run["seed"],
        command=run["command"],
        commit=run["environment"]["commit"],
        date=run["environment"]["date"],
        torch=run["environment"]["torch"],
        test_images=len(datamodule.test_labels),
    )


def _first_images(datamodule: ImageDataModule, loader: Any, most: int) -> Tensor:
    batches: list[Tensor] = []
    for batch in loader:
        batches += [datamodule.on_after_batch_transfer(batch, 0)[0]]
        if sum(map(len, batches)) >= most:
            break
    return torch.cat(batches)[:most]


def _export_for_pixels(
    model: DeployedModel,
    datamodule: ImageDataModule,
    folder: Path,
    description: Description,
    warnings: list[str],
    export_onnx: bool,
) -> dict[str, ExportedFile]:
    raw = PixelModel(model, datamodule.max_value)
    size = datamodule.image_size
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    description = dataclasses.replace(description, input=PIXELS)
    exported = export(raw, folder / "model_int8_uint8", description, pixels, warnings, export_onnx)
    return {f"{_FILE_KEYS[name]}_uint8": file for name, file in exported.items()}


def _taking_floats(model: Runtime) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the model of a file on float images."""
    if model.description.input == UNIT:
        return model
    most = model.description.max_value
    return lambda images: model((images * most).round().to(torch.uint8))


def _as_deployed(model: DeployedModel) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an integer network with its own engine of torch."""

    def run(images: Tensor) -> Tensor:
        with quantized_engine(model.net.engine):  # type: ignore[arg-type]
            return model(images)

    return run


def _timed(
    models: dict[str, Any], fp32_files: dict[str, ExportedFile], files: dict[str, ExportedFile]
) -> dict[str, Any]:
    """Return the models to time on one thread, by their names in metrics.json. They take floats."""
    # The trained network is channels_last. `fp32_eager` uses torch's default layout.
    eager = copy.deepcopy(models["fp32"]).to(memory_format=torch.contiguous_format)
    channels_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    timed: dict[str, Any] = {
        "fp32_eager": eager,
        "fp32_channels_last": lambda images: channels_last(
            images.contiguous(memory_format=torch.channels_last)
        ),
    }
    timed |= {f"fp32_{name}": load(file.path, threads=1) for name, file in fp32_files.items()}
    if "int8" in models:
        timed["int8_eager"] = _as_deployed(models["int8"])
    for name, key in _FILE_KEYS.items():
        if key in files:
            timed[f"int8_{name}"] = load(files[key].path, threads=1)
    if torch.cuda.is_available():
        timed["fp32_cuda"] = copy.deepcopy(models["fp32"]).cuda()
    return timed
