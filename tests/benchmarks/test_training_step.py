import json
from pathlib import Path
from typing import Any

import deterministic
import pytest
import torch
import training_step
from fit_only import fit_only

from tests.benchmarks.test_latency import benchmark


@pytest.mark.slow
def test_the_step_is_timed_inside_a_fit(tmp_path: Path) -> None:
    size = ("--steps", 2, "--warm-up", 1, "--batch-size", 8, "--modes", "eager")
    done = benchmark(
        "training_step.py",
        "trainer=cpu",
        "data=digits",
        *size,
        "--precisions",
        "32-true",
        "--out",
        tmp_path / "step",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    eager = result["precisions"]["32-true"]["eager"]
    fp32, qat = eager["fp32"], eager["qat"]
    assert qat["operations"] == fp32["operations"]  # of matrices and convolutions
    multiply_adds = 8 * 0.556e9 / 4**2  # images of 8 x 8 pixels
    assert fp32["operations"] == pytest.approx(2 * 3 * multiply_adds, rel=0.01)
    for figures in (fp32, qat):
        step_ms = figures["step_ms"]["p50"]
        assert step_ms <= figures["step_ms"]["p95"]
        assert figures["data_ms"]["p50"] < step_ms
        rate = figures["operations"] / step_ms * 1e3
        assert figures["share_of_matrix_rate"] * figures["matrix_rate"] == pytest.approx(rate)
        assert figures["loop_images_per_second"] > 0
    table = (tmp_path / "step.md").read_text()
    assert f"| qat, 32-true, eager | {qat['step_ms']['p50']:.2f} " in table


def test_a_network_that_does_not_compile_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(training_step, "fit", fail)
    found = training_step.figures_of("qat", "default", [], 1, 1)
    assert found == {"error": "RuntimeError: no Triton"}
    with pytest.raises(RuntimeError, match="no Triton"):
        training_step.figures_of("qat", "eager", [], 1, 1)


def test_a_fit_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Could not find 'data/nonsense'"):
        fit_only(tmp_path, "data=nonsense")


def test_one_bit_makes_two_runs_differ() -> None:
    first = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64), "c": torch.ones(1)}
    second = {name: x.clone() for name, x in first.items()}
    assert deterministic.differing(first, second) == []
    second["a"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    del second["c"]
    assert deterministic.differing(first, second) == ["a", "c"]
