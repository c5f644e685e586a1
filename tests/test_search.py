"""Optuna's sweeper: the number that it maximizes, and the effect of a failed job."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from lightning_qat.report.metrics import objective
from tests.conftest import Road, Train, run_train

SEARCH = ("-m", "experiment=search", "data=digits", "hydra.sweeper.n_trials=3")


@pytest.mark.slow
def test_a_search_maximises_validation_accuracy_and_goes_on_after_failures(
    train: Train, road: Road, tmp_path: Path
) -> None:
    status, printed = train(
        *SEARCH,
        "stage=ptq",
        "qconfig=x86",
        "recipe.qat.learning_rate=0.01",
        "data.batch_size=choice(0,32)",
        "trainer.limit_train_batches=choice(1,2)",
        "export_onnx=false",
        "latency_seconds=0",
        f"fp32_ckpt={road.fp32_ckpt}",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert status == 2, printed  # as in any sweep with a job that fails by the user's mistake
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    failed = [row for row in rows if row["status"] == "2"]
    done = [row for row in rows if row["status"] == "0"]
    assert failed
    assert done
    assert len(failed) + len(done) == 3
    assert all("batch_size=0" in row["message"] for row in failed)
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_params"]["data.batch_size"] == 32
    assert best["best_value"] == max(float(row["validation.accuracy.int8"]) for row in done)


def test_the_test_set_is_never_the_objective() -> None:
    metrics = {"accuracy": {"int8": 0.9}, "validation": {"accuracy": {"fp32": 0.7, "int8": 0.6}}}
    assert objective(metrics) == 0.6
    assert objective({"accuracy": {"int8": 0.9}}) is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["data.val_size=0"], ["validation images", "data.val_size"]),
        (["stage=fp32"], ["INT8", "stage=qat"]),
    ],
    ids=" ".join,
)
def test_a_search_that_has_nothing_to_maximise_says_so(
    train: Train, tmp_path: Path, args: list[str], words: list[str]
) -> None:
    status, _ = train(*SEARCH, *args, f"hydra.sweep.dir={tmp_path}")
    assert status == 2
    failures = [json.loads(path.read_text()) for path in tmp_path.glob("*/failure.json")]
    assert len(failures) == 3
    for word in words:
        assert all(word in failure["message"] for failure in failures)


def test_a_plugin_that_is_not_installed_is_named_with_its_extra(tmp_path: Path) -> None:
    package = tmp_path / "hydra_plugins"  # found before the installed package
    package.mkdir()
    (package / "__init__.py").touch()
    done = run_train(*SEARCH, PYTHONPATH=f"{tmp_path}:src")
    assert done.returncode == 2
    assert "pip install 'lightning_qat[optuna]'" in done.stderr
    assert "Traceback" not in done.stderr
