from typing import Any

import tables_gpu

ENVIRONMENT = {"gpu": "A GPU", "torch": "2.11", "date": "2026-12-01", "commit": "0123456789abc"}


def run(accuracy: float = 0.96, int8: float | None = None, **others: Any) -> dict[str, Any]:
    """Return the part of a metrics.json that the tables show."""
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


def test_without_any_result_there_is_one_sentence_and_no_table() -> None:
    text = tables_gpu.gpu_summary({})
    assert "Nothing has been measured on a GPU yet" in text
    assert "|" not in text


def test_a_row_without_results_says_so() -> None:
    text = tables_gpu.gpu_summary({"w4a4_lsq_seed0": run(0.96, 0.946)})
    for name in (*tables_gpu.RUNS, "W2A2"):
        assert set(row(text, name)[1:]) == {"not measured yet"}


def test_accuracy_is_that_of_all_seeds_and_differences_are_paired() -> None:
    results = {
        "fp32_seed0": run(0.9600),
        "fp32_seed1": run(0.9620),
        "seed_experiment_fp32": run(0.88),
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
    assert row(text, "`experiment=seed`")[2:4] == ["88.00% (1 seed)", "not measured yet"]
    assert "A GPU, torch 2.11, 2026-12-01, commit 0123456789: `benchmarks/gpu/README.md`" in text
    assert "FP32, eager: 1.23 ms" in text


def test_a_variant_that_has_no_figures_is_not_shown_as_measured() -> None:
    modes = {
        "eager": {"fp32": step(20), "qat": step(30)},
        "default": {"fp32": step(5), "qat": {"error": "..."}},
    }
    result = {"precisions": {"bf16-mixed": modes}, "environment": ENVIRONMENT}
    lines = tables_gpu.gpu_summary({"steps": result}).splitlines()
    cells = {line.split(" | QAT")[0]: line for line in lines if line.startswith("| bf16-mixed |")}
    eager, compiled = ([x.strip() for x in line.strip("|").split("|")] for line in cells.values())
    assert eager[2:] == [
        "20.00 (p95 21.00)",
        "30.00 (p95 31.00)",
        "1.50",
        "12,346 / 12,346",
        "2.5% / 1.7%",
        "4.2 GB / 4.2 GB",
        "40% / 40%",
    ]
    assert compiled[2] == "failed"
