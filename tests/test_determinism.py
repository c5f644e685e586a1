"""The same command on the same machine gives the same checkpoint, to the bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.conftest import Road, Train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["fp32", "qat"])
def test_two_runs_leave_the_same_checkpoints(
    stage: str, train: Train, road: Road, tmp_path: Path
) -> None:
    args = [
        "data=digits",
        f"stage={stage}",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=6",
        "latency_seconds=0",
        "export_onnx=false",
        f"output_dir={road.output_dir if stage == 'qat' else tmp_path}",
    ]
    runs = {
        "plain": [],
        "asked": ["trainer.deterministic=true"],  # changes nothing on a CPU
        "other": ["data.seed=1"],
    }
    found = {}
    try:
        for run, more in runs.items():
            assert train(*args, *more, f"hydra.run.dir={tmp_path}/{run}")[0] == 0
            found[run] = torch.load(tmp_path / run / "checkpoints" / "last.ckpt")
    finally:
        torch.use_deterministic_algorithms(False)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(found["plain"][part], found["asked"][part]), part
    assert not same(found["plain"]["state_dict"], found["other"]["state_dict"])


def same(one: object, other: object) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
