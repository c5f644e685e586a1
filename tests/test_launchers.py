"""Sweeps on other launchers have the same rows, statuses and files."""

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import Road, run_train

pytestmark = pytest.mark.slow

# SLURM's variables in a job of one task, as in the jobs that submitit starts.
ONE_TASK = {
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}


@pytest.mark.parametrize(
    ("launcher", "environment"), [("joblib", {}), ("submitit_local", ONE_TASK), ("ray", {})]
)
def test_jobs_run_elsewhere_and_a_failed_one_is_a_row(
    road: Road, tmp_path: Path, launcher: str, environment: dict[str, str]
) -> None:
    if launcher == "ray":  # its plugin requires an old cloudpickle: see pyproject.toml
        pytest.importorskip("ray", reason="needs pip install 'lightning_qat[ray]'")
    done = run_train(
        "-m",
        f"launcher={launcher}",
        "stage=ptq",
        "data=digits",
        "overrides={fc:nonsense},null",
        "trainer.limit_train_batches=1",
        "latency_seconds=0",
        "export_onnx=false",
        f"fp32_ckpt={road.fp32_ckpt}",
        f"hydra.sweep.dir={tmp_path}",
        **environment,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    with (tmp_path / "sweep.csv").open() as file:
        failed, finished = csv.DictReader(file)
    assert failed["status"] == "2"
    assert "'nonsense' is unknown" in failed["message"]
    assert "'nonsense' is unknown" in done.stdout
    assert finished["status"] == "0"
    assert float(finished["accuracy.int8"]) > 0.9
    metrics = json.loads((tmp_path / "1-ptq-x86" / "metrics.json").read_text())
    assert metrics["environment"]["threads"] == 1  # otherwise the jobs would compete for the cores
    assert (tmp_path / "1-ptq-x86" / "model_int8.ts").exists()
