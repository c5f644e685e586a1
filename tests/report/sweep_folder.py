"""Jobs of a multirun in the form of train.py, written without running train.py."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.report.run_folder import make_run

NET = {"_target_": "lightning_qat.network.resnet18", "_partial_": True, "stem": "cifar"}


def add_job(sweep: Path, *overrides: str, **changes: Any) -> Path:
    """Add a finished job. A dotted name in `changes` has __ instead of dots."""
    folder = _add(sweep, overrides)
    metrics, _ = make_run("fp32" if "stage=fp32" in overrides else "qat", folder)
    metrics["accuracy"] |= {"fp32": 0.95} | ({} if "stage=fp32" in overrides else {"int8": 0.94})
    for name in ("seed", "qconfig", "data", "model"):
        given = [x.partition("=")[2] for x in overrides if x.startswith(f"{name}=")]
        metrics |= {name: int(given[0]) if name == "seed" else given[0]} if given else {}
    for name, value in changes.items():
        *keys, last = name.split("__")
        place = metrics
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = value
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report.html").touch()
    return folder


def add_failed_job(sweep: Path, message: str, *overrides: str, status: int = 2) -> Path:
    """Add a failed job."""
    folder = _add(sweep, overrides)
    (folder / "failure.json").write_text(json.dumps({"status": status, "message": message}))
    return folder


def _add(sweep: Path, overrides: tuple[str, ...]) -> Path:
    number = len(list(sweep.glob("*/.hydra")))
    folder = sweep / f"{number}-qat-x86"
    (folder / ".hydra").mkdir(parents=True)
    for name, content in (
        ("hydra", {"hydra": {"job": {"num": number}}}),
        ("config", {"model": {"net": NET}}),
        ("overrides", list(overrides)),
    ):
        OmegaConf.save(OmegaConf.create(content), folder / ".hydra" / f"{name}.yaml")
    return folder


def validated(share: float, divergence: float = 0.01, fp32: float = 0.95) -> dict[str, Any]:
    """Return changes for `add_job`: the record of a run with 1000 validation images."""
    accuracy = {"fp32": fp32, "int8": share}
    return {"validation": {"images": 1000, "accuracy": accuracy, "divergence": divergence}}
