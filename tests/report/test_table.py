"""The terminal output at the end of a run."""

from pathlib import Path

import pytest

from lightning_qat.report.table import print_metrics
from tests.report.run_folder import make_run


def printed(capsys: pytest.CaptureFixture[str], folder: Path, right: float) -> list[str]:
    metrics, _ = make_run("qat", folder)
    metrics["accuracy"] = dict.fromkeys(["fp32", "fake_quant", "int8", "onnx", "openvino"], right)
    metrics["accuracy"] |= {f"{name}_uint8": right for name in ("int8", "onnx", "openvino")}
    metrics["test_images"] = 360
    metrics["agreement"] = {f"{x}_uint8_vs_fake_quant": 1.0 for x in ("int8", "onnx", "openvino")}
    metrics["latency_ms"]["int8_torchscript"] = {"p50": 123.45, "p95": 234.56}
    print_metrics(metrics)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    # scipy's binomtest(right, 360).proportion_ci(method="wilson"): 0.97997 .. 0.99848, 0.98944 .. 1
    ("right", "shown"),
    [(358, "99.44% (98-99.8)"), (360, "100.00% (98.9-100)")],
)
def test_80_columns_hold_each_network_with_an_interval_that_ends_at_100(
    right: int,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys, tmp_path, right / 360)
    assert sum(shown in line for line in lines) == 8
    assert any("123.45 (234.56)" in line for line in lines)
    assert any(
        line.startswith("INT8 ONNX Runtime, uint8") and "100.00%" in line.split(")")[1]
        for line in lines
    )
