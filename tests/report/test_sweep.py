"""The end of a multirun: sweep.html, sweep.csv, an answer, and an exit status."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_qat.report.sweep import SweepReport
from tests.report.sweep_folder import add_failed_job, add_job, validated
from tests.report.test_page import Page


def config(sweep: Path, **budget: Any) -> Any:
    overrides = {"task": ["qconfig=a,b", "data=digits"], "hydra": ["hydra.mode=MULTIRUN"]}
    limits = {"megabytes": None, "milliseconds": None} | budget
    hydra = {"sweep": {"dir": str(sweep)}, "overrides": overrides}
    return OmegaConf.create({"hydra": hydra, "budget": limits})


def end(sweep: Path, **budget: Any) -> int:
    """Run the code that Hydra calls after the jobs; return the exit status."""
    with pytest.raises(SystemExit) as raised:
        SweepReport().on_multirun_end(config(sweep, **budget))
    return int(str(raised.value.code))


def page(sweep: Path) -> Page:
    return Page((sweep / "sweep.html").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, exported: dict[str, Path]) -> Path:
    """Return two configurations with real files, one with two seeds, and a failed job."""
    sweep = tmp_path_factory.mktemp("a sweep")
    for name, seed, share, size in (("a", 0, 0.94, 9), ("a", 1, 0.92, 9), ("b", 0, 0.9, 4)):
        job = add_job(
            sweep, "data=digits", f"qconfig={name}", f"seed={seed}",
            accuracy__int8=share, size_bytes__int8_packed=size * 10**6, **validated(share),
        )  # fmt: skip
        for kind in ("ts", "onnx"):
            shutil.copy(exported[kind], job / f"model_int8.{kind}")
    add_failed_job(sweep, "9 bits do not fit <b>quint8</b>: take 8.", "data=digits", "qconfig=<w9>")
    return sweep


def test_one_command_gives_one_answer(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert end(finished, megabytes=5) == 2  # the status of the failed job
    printed = capfd.readouterr().out
    assert "Best within 5 MB: qconfig=b (90.00% on the test set, 4.00 MB, " in printed
    assert f"The whole sweep: {finished}/sweep.html" in printed
    table = printed[printed.index("stage") : printed.index("MB, ms:")]
    assert max(map(len, table.splitlines())) <= 80

    with (finished / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["0", "0", "0", "2"]
    assert rows[1]["accuracy.int8"] == "0.92"
    assert rows[3]["message"].startswith("9 bits do not fit")

    seen = page(finished)
    assert {"front", "configurations", "runs", "environment", "reproduce"} < seen.ids
    assert "Best within 5 MB: qconfig=b" in seen.words
    assert "1 of 4 jobs failed" in seen.words
    assert "failed 9 bits do not fit <b>quint8</b>: take 8." in seen.words
    assert "All runs have data=digits. Each run also has:" in seen.words
    assert "3qconfig=<w9> failed" in seen.words
    assert "python train.py -m qconfig=a,b data=digits" in seen.words
    (speed,) = [words for words in seen.words.split("Fastest on the front")[1:]]
    assert float(speed.split("\xd7")[0]) > 2  # a ResNet18 in eager against a network of two layers


def test_page_needs_nothing_from_outside_and_leads_to_the_runs(finished: Path) -> None:
    end(finished)
    seen = page(finished)
    assert not {"script", "img", "iframe", "b"} & {tag for tag, _ in seen.tags}
    links = {str(attrs["href"]) for tag, attrs in seen.tags if tag == "a"}
    reports = {link for link in links if not link.startswith("#")}
    assert reports == {f"{number}-qat-x86/report.html" for number in range(3)}
    assert all((finished / link).is_file() for link in reports)
    assert all(link[1:] in seen.ids for link in links - reports)


def test_a_file_that_cannot_be_loaded_costs_its_latency_only(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = shutil.copytree(finished, tmp_path / "sweep")
    shutil.rmtree(sweep / "3-qat-x86")
    (sweep / "0-qat-x86" / "model_int8.ts").write_bytes(b"nothing")
    for kind in ("ts", "onnx"):
        (sweep / "2-qat-x86" / f"model_int8.{kind}").unlink()
    assert end(sweep, milliseconds=1e5) == 0
    assert "not timed: " in caplog.text
    assert "Best within 100000 ms: qconfig=a" in page(sweep).words


def test_a_fault_in_the_timing_does_not_cost_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("lightning_qat.report.sweep_latency.measure", fail)
    add_job(tmp_path)
    assert end(tmp_path, milliseconds=1) == 1
    assert "None is known to fit within 1 ms: no latency was measured" in page(tmp_path).words


def test_names_in_the_plots_are_short(tmp_path: Path) -> None:
    for rate in ("0.0012345678901234", "0.1"):
        add_job(tmp_path, "qconfig=w4a4", f"model.learning_rate={rate}")
    add_job(tmp_path, "qconfig=w2a2", "model.learning_rate=0.1")
    assert end(tmp_path) == 0
    words = page(tmp_path).words
    for name in ("w4a4 learning_rate=0.00123", "w4a4 learning_rate=0.1", "w2a2 learning_rate=0.1"):
        assert name in words
    assert "qconfig=w4a4 model.learning_rate=0.0012345678901234" in words  # in the table


def test_where_every_job_failed_the_page_says_so(tmp_path: Path) -> None:
    add_failed_job(tmp_path, "why", "qconfig=a")
    add_failed_job(tmp_path, "ours", "qconfig=b", status=1)
    assert end(tmp_path, megabytes=5) == 1
    seen = page(tmp_path)
    assert "Every job failed." in seen.words
    assert "None within 5 MB: no configuration has a whole network in INT8" in seen.words
    assert "front" not in seen.ids


def test_a_sweep_without_jobs_is_a_mistake(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert end(tmp_path) == 2
    assert "holds no job" in caplog.text


@pytest.mark.parametrize("most", ["lots", 0, -1, float("nan")])
def test_a_budget_that_is_none_is_refused_before_the_jobs(
    most: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        SweepReport().on_multirun_start(config(tmp_path, milliseconds=most))
    assert f"budget.milliseconds={most!r} is not permitted" in caplog.text


def test_fp32_runs_alone_are_configurations_without_a_choice(tmp_path: Path) -> None:
    for seed, share in enumerate((0.94, 0.95, 0.96)):
        add_job(tmp_path, "stage=fp32", f"seed={seed}", accuracy__fp32=share)
    assert end(tmp_path) == 0
    seen = page(tmp_path)
    assert "t over 3 seeds" in seen.words
    assert "There is nothing to choose: no configuration has a whole network in" in seen.words


def test_the_test_set_does_not_choose_unless_the_page_says_so(tmp_path: Path) -> None:
    add_job(tmp_path, "qconfig=a", accuracy__int8=0.96, **validated(0.90))
    add_job(tmp_path, "qconfig=b", accuracy__int8=0.93, **validated(0.92))
    assert end(tmp_path, megabytes=20) == 0
    words = page(tmp_path).words
    assert "Best within 20 MB: qconfig=b (93.00%" in words
    assert "Chosen by the test set" not in words

    add_job(tmp_path, "qconfig=c", "data.val_size=0", accuracy__int8=0.92)
    assert end(tmp_path, megabytes=20) == 0
    words = page(tmp_path).words
    assert "Best within 20 MB: qconfig=a (96.00%" in words
    assert "Chosen by the test set:" in words


def test_several_data_sets_are_not_compared(tmp_path: Path) -> None:
    add_job(tmp_path, "data=digits")
    add_job(tmp_path, "data=cifar10")
    assert end(tmp_path) == 0
    seen = page(tmp_path)
    assert "the runs are of several data sets" in seen.words
    assert "front" not in seen.ids


@pytest.mark.parametrize("with_validation", [True, False])
def test_sensitivity_names_the_layers_to_keep_in_float(
    with_validation: bool, tmp_path: Path
) -> None:
    costs = {"conv1": 0.01, "layer1.0.conv1": 0.002, "<fc>": 0.03, "layer2.0.conv1": 0.0}
    for layer, cost in costs.items():
        changes = validated(0.95 - cost, divergence=2 * cost) if with_validation else {}
        add_job(tmp_path, f"only={layer}", accuracy__int8=0.95 - cost, **changes)
    assert end(tmp_path) == 0
    seen = page(tmp_path)
    assert "'overrides={<fc>:null}'" in seen.words
    table = seen.words[seen.words.index("All 4 layers, worst first") :]
    places = [table.index(layer) for layer in ("<fc>", "conv1", "layer1.0", "layer2.0")]
    assert places == sorted(places)
    figures = [str(attrs["aria-label"]) for tag, attrs in seen.tags if tag == "svg"]
    where = "validation" if with_validation else "test"
    assert figures == ["Cost of each layer, worst first", f"Loss of {where} accuracy by each layer"]
    said = "0.06 nats of divergence" if with_validation else "3 points of test accuracy lost"
    assert f"is <fc>: {said}." in seen.words
    assert "fc" not in {tag for tag, _ in seen.tags}
