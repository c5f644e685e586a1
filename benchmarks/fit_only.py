"""Run `train.py` until the end of its fit, in its own process, for the other benchmarks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytorch_lightning as pl

HERE = Path(__file__).parent
RANDOM_WEIGHTS = ["model.weights=null", "++model.starts_trained=false"]  # needed for stage=qat


class FitOnly(pl.Callback):
    """End the process after the last epoch. Its checkpoint is written, and nothing is tested."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> NoReturn:
        """End the process with status 0."""
        sys.exit(0)


def fit_only(folder: Path, *overrides: str) -> None:
    """Run `python train.py` with these overrides. All output goes into ``folder``.

    Raises:
        RuntimeError: the run failed. The message is the end of its output.
    """
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", f"output_dir={folder}"]
    last = "+callbacks.fit_only={_target_:fit_only.FitOnly}"
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, *overrides, last],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stdout.splitlines()[-20:]))
