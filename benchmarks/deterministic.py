"""Check that two runs with `trainer.deterministic=true` have the same bits in every weight.

    python benchmarks/deterministic.py stage=qat trainer=gpu --out FILE

Both are fits of `train.py` of two epochs, each in its own process, from the same random weights.
Writes FILE.json and FILE.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fit_only import RANDOM_WEIGHTS, fit_only
from record import origin, write

from lightning_qat.quantization.checkpoints import read_checkpoint


def trained(overrides: list[str]) -> dict[str, Any]:
    """Return all weights and statistics after two epochs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        deterministic = ["trainer.deterministic=true", "trainer.max_epochs=2"]
        fit_only(folder, *deterministic, *RANDOM_WEIGHTS, *overrides)
        return read_checkpoint(folder / "checkpoints" / "last.ckpt", "")["state_dict"]


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the names of the tensors that differ in any bit, or are missing in one of the two."""
    both = first.keys() & second.keys()
    same = {name for name in both if torch.equal(first[name], second[name])}
    return sorted((first.keys() | second.keys()) - same)


def main() -> None:
    """Train twice, compare the weights, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args, overrides = parser.parse_known_args()
    first, second = trained(overrides), trained(overrides)
    differ = differing(first, second)
    result = {"identical": not differ, "tensors": len(first), "differ": differ, **origin()}
    verdict = f"{len(differ)} differ" if differ else "all the same"
    write(result, f"Of {len(first)} tensors: {verdict}. `{result['command']}`\n", args.out)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
