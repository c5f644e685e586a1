import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deterministic
import pytest
import tables_gpu
import torch
import training_step
from fit_only import fit_only

from tests.benchmarks.test_latency import benchmark

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"gpu": "A GPU", "torch": "2.11", "date": "2026-12-01", "commit": "0123456789abc"}


def gpu_sh(folder: Path, *args: str, python: str = sys.executable) -> tuple[int, str]:
    variables = {"RESULTS": "results", "OUTPUT_DIR": "outputs", "TMPDIR": "."}
    environment = {name: str(folder / path) for name, path in variables.items()}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *args],
        env=os.environ | environment | {"PYTHON": python},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def run(accuracy: float = 0.96, int8: float | None = None, **others: Any) -> dict[str, Any]:
    """The part of a metrics.json that the tables show."""
    return {
        "epochs": 100,
        "command": "python train.py",
        "accuracy": {"fp32": accuracy} | ({} if int8 is None else {"int8": int8}),
        "latency_ms": {"fp32_cuda": {"p50": 1.234}},
        "training": {"seconds": 120.0},
        "environment": ENVIRONMENT,
        **others,
    }


def step(ms: float, **others: Any) -> dict[str, Any]:
    return {
        "step_ms": {"p50": ms, "p95": ms + 1},
        "data_ms": {"p50": 0.5},
        "loop_images_per_second": 12345.6,
        "peak_bytes": {"allocated": 3e9, "reserved": 4.25e9},
        "share_of_matrix_rate": 0.4,
        **others,
    }


def row(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_list_names_every_row_of_the_tables(tmp_path: Path) -> None:
    status, printed = gpu_sh(tmp_path, "--list")
    assert status == 0
    names = [line.split()[0] for line in printed.splitlines()]
    assert len(names) == len(set(names))
    patterns = [x.format(stage) for x in tables_gpu.RUNS.values() for stage in ("fp32", "qat")]
    patterns += ["ptq_seed*", "imagenet_stem_ptq_seed*", "fp32_epochs*", "training_*"]
    for pattern in patterns:
        assert any(tables_gpu.fnmatch(name, pattern) for name in names), pattern
    for pieces in tables_gpu.FEW_BITS.values():
        assert sum(tables_gpu.fnmatch(name, pieces) for name in names) == 3
    steps = {f"step_{m}_{p}" for m in tables_gpu.STEMS for p in tables_gpu.PRECISIONS}
    assert steps | {"deterministic_fp32", "deterministic_qat"} <= set(names)
    for line in printed.splitlines():
        assert 0 < int(line.split()[1]) <= 9  # minutes
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_name_is_refused(tmp_path: Path) -> None:
    status, printed = gpu_sh(tmp_path, "--list", "fp32_seed[01]", "fp64_seed0")
    assert status == 2
    assert [x.split()[0] for x in printed.splitlines()[:2]] == ["fp32_seed0", "fp32_seed1"]
    assert "no piece is called fp64_seed0" in printed


def test_what_has_a_result_is_left_alone_and_shown(tmp_path: Path) -> None:
    result = tmp_path / "results" / "gpu" / "fp32_seed1.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(run(0.9612)))
    before = result.stat().st_mtime_ns
    status, printed = gpu_sh(tmp_path, "fp32_seed1")
    assert status == 0
    assert "fp32_seed1: has its result" in printed
    assert "96.12% (1 seed)" in printed
    assert result.stat().st_mtime_ns == before


def test_a_piece_that_fails_says_so_and_the_next_goes_on(tmp_path: Path) -> None:
    status, printed = gpu_sh(tmp_path, "qat_seed[01]")  # there are no weights to start from
    assert status == 1
    for seed in range(2):
        assert f"qat_seed{seed}: failed with status 2" in printed
        assert f"seed{seed}.ckpt" in (tmp_path / f"outputs/qat_seed{seed}.log").read_text()
    assert "failed: qat_seed0 qat_seed1" in printed
    assert list((tmp_path / "results" / "gpu").iterdir()) == []


def test_a_piece_without_a_result_has_failed(tmp_path: Path) -> None:
    status, printed = gpu_sh(tmp_path, "step_resnet18_32-true", python="true")
    assert status == 1
    assert "step_resnet18_32-true: ended well but left no result" in printed


def test_a_training_that_was_cut_off_goes_on_and_one_that_ended_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "fp32_seed0"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (folder / "metrics.json").write_text("{}")
    status, printed = gpu_sh(tmp_path, "fp32_seed0", python="echo")  # shows what it is called with
    assert status == 0, printed
    log = (tmp_path / "outputs" / "fp32_seed0.log").read_text()
    assert f"train.py hydra.run.dir={folder} " in log
    assert f"ckpt_path={checkpoint}" in log
    assert (tmp_path / "results" / "gpu" / "fp32_seed0.json").read_text() == "{}"
    assert not checkpoint.exists()


@pytest.mark.slow
def test_the_step_is_timed_inside_a_fit(tmp_path: Path) -> None:
    size = ("--steps", 3, "--warm-up", 1, "--batch-size", 32, "--modes", "eager")
    done = benchmark(
        "training_step.py", "trainer=cpu", "data=digits", *size, "--out", tmp_path / "step"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    eager = result["modes"]["eager"]
    fp32, qat = eager["fp32"], eager["qat"]
    assert qat["operations"] == fp32["operations"]  # of matrices and convolutions
    multiply_adds = 32 * 0.556e9 / 4**2  # images of 8 x 8 pixels
    assert fp32["operations"] == pytest.approx(2 * 3 * multiply_adds, rel=0.01)
    for figures in (fp32, qat):
        step_ms = figures["step_ms"]["p50"]
        assert step_ms <= figures["step_ms"]["p95"]
        assert figures["data_ms"]["p50"] < step_ms
        rate = figures["operations"] / step_ms * 1e3
        assert figures["share_of_matrix_rate"] * figures["matrix_rate"] == pytest.approx(rate)
        assert figures["loop_images_per_second"] > 0
    assert eager["qat_over_fp32"] == qat["step_ms"]["p50"] / fp32["step_ms"]["p50"]
    table = (tmp_path / "step.md").read_text()
    assert f"| qat, eager | {qat['step_ms']['p50']:.2f} " in table


def test_a_network_that_does_not_compile_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(training_step, "fit_only", fail)
    assert training_step.measure("qat", "default", [], 1, 1) == {"error": "no Triton"}
    with pytest.raises(RuntimeError, match="no Triton"):
        training_step.measure("qat", "eager", [], 1, 1)


def test_a_fit_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Could not find 'data/nonsense'"):
        fit_only(tmp_path, "data=nonsense")


def test_nothing_measured_says_so_in_every_table() -> None:
    text = tables_gpu.gpu_summary({})
    for name in tables_gpu.RUNS:
        assert set(row(text, name)[1:]) == {"not measured yet"}
    assert set(row(text, "shortest schedule")[1:]) == {"not measured yet"}
    assert row(text, "ImageNet stem, bf16-mixed")[1] == "not measured yet"
    for bits in tables_gpu.FEW_BITS:
        assert set(row(text, bits)[1:]) == {"not measured yet"}
    assert text.count("not measured yet") == 18 + 6 + 3 + 4 + 3 + 1
    assert "No GPU was at hand" in text


def test_accuracy_is_that_of_all_seeds_and_differences_are_paired() -> None:
    results = {
        "fp32_seed0": run(0.9600),
        "fp32_seed1": run(0.9620),
        "fp32_epochs15_seed0": run(0.9, epochs=15),
        "imagenet_stem_fp32_seed0": run(0.88),
        "w4a4_lsq_seed0": run(0.96, 0.946, epochs=30),
        "qat_seed0": run(0.9600, 0.9610, epochs=5, training={"seconds": 11.0}),
        "qat_seed1": run(0.9620, 0.9632, epochs=5, training={"seconds": 13.0}),
    }
    text = tables_gpu.gpu_summary(results)
    assert row(text, "CIFAR stem") == [
        "CIFAR stem",
        "100 + 5",
        "96.10% (96.00 to 96.20, 2 seeds)",
        "96.21% (96.10 to 96.32, 2 seeds)",
        "+0.11 ± 0.13",  # t of 1 degree of freedom, 12.7, times 0.01
        "not measured yet",
        "120 s + 12 s",
    ]
    assert row(text, "W4A4") == ["W4A4", "30", "94.60% (1 seed)", "-1.40 (1 seed)"]
    assert row(text, "ImageNet stem")[2:4] == ["88.00% (1 seed)", "not measured yet"]
    assert "A GPU, torch 2.11, 2026-12-01, commit 0123456789: `benchmarks/gpu.sh`" in text
    assert "FP32, eager: 1.23 ms" in text


def test_the_shortest_schedule_whose_mean_reaches_the_target() -> None:
    results = {
        "fp32_epochs15_seed0": run(0.9410, epochs=15, training={"seconds": 20.0}),
        "fp32_epochs15_seed1": run(0.9400, epochs=15, training={"seconds": 22.0}),
        "fp32_epochs30_seed0": run(0.9510, epochs=30, training={"seconds": 40.0}),
        "fp32_epochs30_seed1": run(0.9480, epochs=30, training={"seconds": 40.0}),
        "fp32_seed0": run(0.965),
    }
    cells = row(tables_gpu.gpu_summary(results), "shortest schedule")
    assert cells[1].startswith("21 s (15 epochs, 94.05%")
    assert cells[2].startswith("120 s (100 epochs")
    del results["fp32_seed0"]
    assert row(tables_gpu.gpu_summary(results), "shortest schedule")[2:] == 2 * ["not reached"]


def test_a_step_is_shown_in_its_fastest_mode_that_works() -> None:
    modes = {
        "eager": {"fp32": step(20), "qat": step(30), "qat_over_fp32": 1.5},
        "default": {"fp32": step(10), "qat": step(12), "qat_over_fp32": 1.2},
        "reduce-overhead": {"fp32": step(5), "qat": {"error": "..."}, "qat_over_fp32": None},
    }
    result = {"modes": modes, "environment": ENVIRONMENT}
    text = tables_gpu.gpu_summary({"step_resnet18_bf16-mixed": result})
    assert row(text, "CIFAR stem, bf16-mixed")[1:] == [
        "default",
        "10.00 (p95 11.00)",
        "12.00 (p95 13.00)",
        "1.20",
        "12,346 / 12,346",
        "5.0% / 4.2%",
        "4.2 GB / 4.2 GB",
        "40% / 40%",
    ]


def test_one_bit_makes_two_runs_differ() -> None:
    first = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64), "c": torch.ones(1)}
    second = {name: x.clone() for name, x in first.items()}
    assert deterministic.differing(first, second) == []
    second["a"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    del second["c"]
    assert deterministic.differing(first, second) == ["a", "c"]
