"""Check an output folder: each file is complete, and the same as without the fault."""

import json
import re
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime
import torch

from lightning_qat.data.cifar10_records import BATCHES
from lightning_qat.deployment.runtimes import load

ONE_CORE = Lock()  # two threads that load OpenVINO's core at once would each get their own core


def assert_whole(out: Path) -> None:
    """Check that every file with its final name loads."""
    for path in (path for path in out.rglob("*") if path.is_file()):
        if path.name.startswith("."):
            continue  # unfinished, or a lock
        if path.suffix == ".ckpt":
            assert torch.load(path, weights_only=True)["state_dict"], path
        elif path.suffix == ".ts":
            torch.jit.load(path)
        elif path.suffix == ".onnx":
            onnxruntime.InferenceSession(path)
        elif path.suffix == ".xml":
            with ONE_CORE:
                load(path)  # with its .bin
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["status"] == 0, path
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path
        elif path.suffix == ".npz":
            with np.load(path) as content:
                assert set(content) == set(BATCHES)
                assert all(len(content[name]) for name in BATCHES)
        elif path.name == "layers.csv":
            assert path.read_text().endswith("\n")


def names(out: Path, run: str = "run") -> set[str]:
    """Return every file and empty folder below `out`, of one run folder only, without times."""
    found = set()
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if path.is_dir() and any(path.iterdir()):
            continue
        if name.startswith("run") and not name.startswith(f"{run}/"):
            continue
        name = re.sub(r"tfevents\.[\w.]+", "tfevents", name)
        found.add(re.sub(f"^{run}/", "run/", name))
    return found


def assert_same(out: Path, undisturbed: Path, run: str = "run") -> None:
    """Compare weights bit by bit, results of the INT8 models, accuracies, and the list of files."""
    assert_whole(out)
    assert names(out, run) == names(undisturbed)
    for path in undisturbed.rglob("*.ckpt"):
        ours = out / re.sub("^run/", f"{run}/", path.relative_to(undisturbed).as_posix())
        _assert_equal(weights(ours), weights(path), path.name)
    figures = [json.loads((at / "metrics.json").read_text()) for at in _runs(out, undisturbed, run)]
    for key in ("status", "accuracy", "agreement", "epochs", "validation"):
        assert figures[0].get(key) == figures[1].get(key), key
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scripts = [at / "model_int8.ts" for at in _runs(out, undisturbed, run)]
    if scripts[1].exists():
        logits = [torch.jit.load(path)(images) for path in scripts]
        assert torch.equal(*logits)
    graphs = [at / "model_int8.onnx" for at in _runs(out, undisturbed, run)]
    if graphs[1].exists():
        logits = [
            onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
            for path in graphs
        ]
        assert np.array_equal(*logits)
    irs = [at / "model_int8.xml" for at in _runs(out, undisturbed, run)]
    if irs[1].exists():
        with ONE_CORE:
            logits = [load(path)(images) for path in irs]
        assert torch.equal(*logits)


def _runs(out: Path, undisturbed: Path, run: str) -> tuple[Path, Path]:
    return out / run, undisturbed / "run"


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


def _assert_equal(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), (where, name)
