"""The table of the accuracy that few bits lose and recover."""

import json
from pathlib import Path
from typing import Any

import few_bits
import pytest
import torch
from finished_run import read

from tests.benchmarks.test_latency import benchmark
from tests.conftest import Road


@pytest.mark.slow
def test_a_sweep_becomes_a_table_with_batch_norm_estimated_anew(road: Road, tmp_path: Path) -> None:
    sweep = road.sweep
    done = benchmark("few_bits.py", sweep, "--batches", 8, "--out", tmp_path / "table")
    assert done.returncode == 0, done.stderr
    (rows,) = json.loads((tmp_path / "table.json").read_text())["sweeps"]
    assert [row["int8"] for row in rows] == [
        [road.metrics(stage)["accuracy"]["int8"]] for stage in ("ptq", "qat")
    ]
    assert rows[0]["anew"] is None, "calibration leaves no checkpoint"
    assert rows[1]["anew"] == pytest.approx(rows[1]["int8"], abs=0.03)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["`stage=ptq`", "`stage=qat`"]
    assert str(sweep) in lines[-1]


@pytest.mark.slow
def test_batch_norm_gets_the_mean_of_its_batches(road: Road) -> None:
    run = read(road.job("qat"))
    run.datamodule.setup("fit")
    net: Any = run.fake_quant
    few_bits.estimate_batch_norm(net, run, batches=1)
    loader = run.datamodule.train_dataloader()
    images, _ = run.datamodule.on_after_batch_transfer(next(iter(loader)), 0)
    with torch.no_grad():
        sums = run.fp32.conv1._conv_forward(  # type: ignore[operator]
            run.deployed(net).normalize(images), net.conv1.weight, None
        ).mean((0, 2, 3))
    assert (net.bn1.running_mean - sums).norm() < 0.05 * sums.norm()
    assert not net.training


@pytest.mark.parametrize(
    ("ours", "cell"),
    [([0.5], "+10.00"), ([0.5, 0.52, 0.54], "+12.00 (+7.03 to +16.97)"), ([0.5] * 3, "+10.00")],
)
def test_differences_have_an_interval_from_three_seeds_on(ours: list[float], cell: str) -> None:
    assert few_bits.difference(ours, [0.4] * len(ours)) == cell
