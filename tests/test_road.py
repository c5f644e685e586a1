"""The results of the main command on the embedded data."""

import csv
import re

import pytest
import torch

from lightning_qat.data import DigitsDataModule
from lightning_qat.deployment.accuracy import accuracy, predict_test_set, validate
from tests.conftest import Road

pytestmark = pytest.mark.slow


def test_fp32_learns_the_digits(road: Road) -> None:
    assert road.metrics("fp32")["accuracy"]["fp32"] >= 0.97


@pytest.mark.parametrize("stage", ["ptq", "qat"])
def test_int8_is_as_accurate_as_fp32(road: Road, stage: str) -> None:
    figures = road.metrics(stage)["accuracy"]
    assert figures["int8"] >= figures["fp32"] - 0.01


@pytest.mark.parametrize("stage", ["ptq", "qat"])
def test_int8_is_the_network_that_was_trained(road: Road, stage: str) -> None:
    metrics = road.metrics(stage)
    assert metrics["agreement"]["int8_vs_fake_quant"] >= 1 - 1 / metrics["test_images"]
    assert metrics["agreement"]["onnx_vs_fake_quant"] == 1
    assert metrics["bit_identical"]["onnx_vs_fake_quant"] == 1


@pytest.mark.parametrize("stage", ["ptq", "qat"])
def test_int8_is_four_times_smaller_and_faster(road: Road, stage: str) -> None:
    metrics = road.metrics(stage)
    assert metrics["size_bytes"]["int8"] < 0.27 * metrics["size_bytes"]["fp32"]
    latency = metrics["latency_ms"]
    assert latency["int8_torchscript"]["p50"] < latency["fp32_torchscript"]["p50"]
    for runtime in ("fp32_eager", "fp32_torchscript", "int8_eager", "int8_torchscript"):
        assert 0 < latency[runtime]["p50"] <= latency[runtime]["p95"]


def test_every_stage_starts_from_the_same_float_network(road: Road) -> None:
    of_stages = {road.metrics(stage)["accuracy"]["fp32"] for stage in ("fp32", "ptq", "qat")}
    assert len(of_stages) == 1


def test_metrics_say_what_was_run_and_where(road: Road) -> None:
    metrics = road.metrics("qat")
    said = {key: metrics[key] for key in ("stage", "data", "model", "qconfig", "seed", "status")}
    assert said == {
        "stage": "qat",
        "data": "digits",
        "model": "resnet18",
        "qconfig": "x86",
        "seed": 0,
        "status": 0,
    }
    assert metrics["epochs"] == 4
    assert 0.1 < metrics["training"]["seconds"] < 600
    assert 1e8 < metrics["peak_bytes"]["rss"] < 2.5e9
    assert road.metrics("ptq")["epochs"] == 0
    assert road.metrics("fp32")["qconfig"] is None
    assert {"torch", "python", "cpu", "vnni", "threads", "gpu", "commit", "date"} <= set(
        metrics["environment"]
    )


def test_the_exported_file_classifies_the_test_images_by_itself(road: Road) -> None:
    model = torch.jit.load(road.job("qat") / "model_int8.ts")
    datamodule = DigitsDataModule()
    datamodule.setup("test")
    logits, labels = predict_test_set({"int8": model}, datamodule)
    assert accuracy(logits["int8"], labels) == road.metrics("qat")["accuracy"]["int8"]


def test_the_validation_images_have_figures_of_their_own(road: Road) -> None:
    models = {name: torch.jit.load(road.job("qat") / "model_int8.ts") for name in ("fp32", "int8")}
    datamodule = DigitsDataModule()
    datamodule.setup("test")
    found, same = road.metrics("qat")["validation"], validate(models, datamodule)
    assert found["images"] == same["images"] == 144
    assert found["accuracy"]["int8"] == same["accuracy"]["int8"]
    assert 0 < found["divergence"] < 0.1
    assert same["divergence"] == 0
    of_fp32 = road.metrics("fp32")["validation"]
    assert of_fp32["accuracy"] == {"fp32": found["accuracy"]["fp32"]}
    assert "divergence" not in of_fp32


def test_8_bit_weights_are_as_large_packed_as_their_file_says(road: Road) -> None:
    sizes = road.metrics("ptq")["size_bytes"]
    assert 0.98 * sizes["int8"] < sizes["int8_packed"] < sizes["int8"]


def test_the_exported_file_runs_integer_kernels(road: Road) -> None:
    model = torch.jit.load(road.job("qat") / "model_int8.ts")
    graph = str(model.inlined_graph)
    assert len(re.findall(r"quantized::conv2d(_relu)?\(", graph)) == 20
    assert (
        len(re.findall(r"quantized::linear_with_input_q_dq_qweight_dq_output_fp32\(", graph)) == 1
    )
    assert len(re.findall(r"quantized::add_relu\(", graph)) == 8
    assert "aten::conv2d" not in graph
    assert "aten::batch_norm" not in graph


def test_checkpoints_where_something_was_trained(road: Road) -> None:
    for stage, names in {
        "fp32": {"best.ckpt", "last.ckpt"},
        "qat": {"best.ckpt", "last.ckpt"},
    }.items():
        assert {path.name for path in (road.job(stage) / "checkpoints").iterdir()} == names
    assert not (road.job("ptq") / "checkpoints").exists()


def test_checkpoints_load_without_executing_anything(road: Road) -> None:
    files = [road.fp32_ckpt, *road.job("qat").glob("checkpoints/*.ckpt")]
    assert len(files) == 3
    for file in files:
        hyper_parameters = torch.load(file, weights_only=True)["hyper_parameters"]
        assert type(hyper_parameters) is dict
        assert hyper_parameters["num_classes"] == 10


def test_curves_are_logged(road: Road) -> None:
    with (road.job("qat") / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr-SGD/pg1"):
        assert any(row[name] for row in rows), name
    assert list((road.job("qat") / "tensorboard").glob("events.*"))


def test_the_sweep_ends_with_a_table(road: Road) -> None:
    file = road.sweep / "sweep.csv"
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["stage"] for row in rows] == ["fp32", "ptq", "qat"]
    assert float(rows[2]["accuracy.int8"]) == road.metrics("qat")["accuracy"]["int8"]
    table = road.printed[road.printed.rindex("stage") :]
    assert f"{road.metrics('qat')['accuracy']['int8']:.2%}" in table
    table, _, after = table.partition("The whole sweep: ")
    assert max(map(len, table.splitlines())) <= 80
    assert after.strip() == str(file.with_name("sweep.html"))
    page = file.with_name("sweep.html").read_text()
    for stage in ("ptq", "qat"):
        assert f'href="{road.job(stage).name}/report.html"' in page
    assert "Fastest on the front" in page  # the latencies were measured


def test_nothing_deprecated_is_printed(road: Road) -> None:
    for text in (road.printed, road.warned):
        assert "deprecat" not in text.lower()
