import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.deployment import latency
from lightning_qat.deployment.deployed import DeployedModel, save_torchscript
from lightning_qat.deployment.description import PIXELS, UNIT, Description
from lightning_qat.deployment.latency import LEAST_ROUNDS, measure_latency
from lightning_qat.deployment.onnx_export import save_onnx, to_onnx
from lightning_qat.deployment.openvino_export import is_installed, save_openvino
from lightning_qat.quantization.torch_model import torch_script
from tests.conftest import Road
from tests.quantization.networks import SmallNet

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DESCRIPTION = Description(
    classes=list("abcd"),
    image_size=8,
    input=UNIT,
    max_value=255,
    mean=[0.5] * 3,
    std=[0.25] * 3,
    stage="fp32",
    data="noise",
    model="small",
    qconfig=None,
    engine=None,
    seed=0,
    command="",
    commit=None,
    date="",
    torch=torch.__version__,
    test_images=1,
)


class Clock:
    """A clock that only runtimes move, so that no other process disturbs a measurement."""

    def __init__(self) -> None:
        self.now = 0.0
        self.last: Any = None

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(eq=False)
class Runtime:
    """A runtime that takes a fixed time, and more in the first calls after another runtime."""

    clock: Clock
    seconds: float
    cold: float = 0.0
    cold_calls: int = 0
    in_a_row: int = 0
    calls: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.in_a_row = self.in_a_row + 1 if self.clock.last is self else 1
        self.clock.last = self
        self.calls += 1
        self.clock.sleep(self.cold if self.in_a_row <= self.cold_calls else self.seconds)
        return images


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_what_others_have_pushed_out_of_the_cache_does_not_count(clock: Clock) -> None:
    cold, steady = Runtime(clock, 1e-4, 1e-3, 9), Runtime(clock, 2e-4)
    figures = measure_latency({"a": cold, "b": steady}, torch.rand(1, 3, 8, 8), 5, 1)
    assert figures["a"] == pytest.approx({"p50": 0.1, "p95": 0.1, "calls": 50})
    assert figures["b"] == pytest.approx({"p50": 0.2, "p95": 0.2, "calls": 50})


def test_a_slow_runtime_ends_the_measurement_in_time(clock: Clock) -> None:
    slow, fast = Runtime(clock, 8.0), Runtime(clock, 1e-4)
    figures = measure_latency({"slow": slow, "fast": fast}, torch.rand(2, 3, 8, 8), seconds=5)
    assert slow.calls == 2 * LEAST_ROUNDS  # warm-up and measurement
    assert figures["slow"] == pytest.approx({"p50": 8e3, "p95": 8e3, "calls": LEAST_ROUNDS})


def test_torch_gets_the_threads_and_a_pixel_model_gets_pixels() -> None:
    before, threads, seen = torch.get_num_threads(), set(), []

    class PixelModel:
        description = replace(DESCRIPTION, input=PIXELS, max_value=16)

        def __call__(self, images: Tensor) -> Tensor:
            threads.add(torch.get_num_threads())
            seen.append(images)
            return images

    images = torch.arange(17.0).div(16).view(1, 1, 1, 17)
    measure_latency({"int8_onnx": PixelModel()}, images, 1, 1, threads=before + 1)
    assert threads == {before + 1}
    assert torch.get_num_threads() == before
    assert seen[0].dtype == torch.uint8
    assert seen[0].flatten().tolist() == list(range(17))


def benchmark(script: str, *args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, args)], capture_output=True, text=True
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return one small FP32 network in every format; two files are described as INT8."""
    model = DeployedModel(SmallNet().eval(), DESCRIPTION.mean, DESCRIPTION.std)
    proto = to_onnx(model, torch.rand(2, 3, 8, 8))
    paths = [tmp_path / "a.ts", tmp_path / "b.onnx", tmp_path / "c.onnx"]
    int8 = replace(DESCRIPTION, qconfig="x86")
    save_torchscript(torch_script(model), paths[0], int8)
    save_onnx(proto, paths[1], int8)
    save_onnx(proto, paths[2], DESCRIPTION)
    if is_installed():
        paths.append(tmp_path / "d.xml")
        save_openvino(proto, paths[-1], int8)
    return paths


def test_files_side_by_side_and_the_fastest_at_the_end(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "results" / "small"
    options = ("--batch", 1, 3, "--threads", 1, "--seconds", 0.1, "--out", out)
    done = benchmark("latency.py", *files, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    assert [(cell["batch"], cell["threads"]) for cell in result["cells"]] == [(1, 1), (3, 1)]
    for cell in result["cells"]:
        p50 = {name: x["p50"] for name, x in cell["latency_ms"].items()}
        assert [name.split()[1] for name in p50] == [str(path) for path in files]
        best = cell["recommendation"]
        assert p50[best["artifact"]] == min(p50.values())
        assert best["best_fp32"] == f"fp32_onnx {files[2]}"
        assert best["over_best_fp32"] == p50[best["best_fp32"]] / min(p50.values())
        assert best["over_fp32_eager"] is None
        name = f"int8_torchscript {files[0]}"
        assert cell["images_per_second"][name] == pytest.approx(1e3 * cell["batch"] / p50[name])
    assert result["environment"]["cpu"]
    table = out.with_suffix(".md").read_text()
    assert done.stdout.rstrip().endswith(table.rstrip())
    last = table.rstrip().splitlines()[-2:]
    assert [line.split(" | ")[0] for line in last] == ["| 1", "| 3"]


def test_no_run_and_no_model_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for what, message in ((tmp_path, "no finished run"), (tmp_path / "notes.txt", "no exported")):
        done = benchmark("latency.py", what)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ptq", "qat"])
def test_a_run_in_every_runtime_there_is(road: Road, tmp_path: Path, stage: str) -> None:
    options = ("--batch", 2, "--threads", 1, "--seconds", 0.1, "--out", tmp_path / "run")
    done = benchmark("latency.py", road.job(stage), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run.json").read_text())
    measured, skipped = result["cells"][0]["latency_ms"].keys(), result["skipped"]
    fp32 = ("eager", "channels_last", "torchscript", "onnx", "openvino", "cuda")
    int8 = ("eager", "torchscript", "onnx", "openvino")
    expected = {*(f"fp32_{name}" for name in fp32), *(f"int8_{name}" for name in int8)}
    assert measured | skipped.keys() == expected
    assert not measured & skipped.keys()
    assert ("int8_eager" in skipped) == (stage == "ptq")
    assert ("fp32_cuda" in skipped) == (not torch.cuda.is_available())
    for name, why in skipped.items():
        assert f"skipped: {name}, {why}" in done.stdout
    assert {"fp32_eager", "fp32_onnx", "int8_torchscript", "int8_onnx"} <= measured
    assert result["cells"][0]["recommendation"]["over_fp32_eager"] > 1
