"""A job on several devices: who starts its processes, and what each of them has to know.

torchrun and srun start all of them, each with the whole command line. Where neither did, Lightning
starts the others by running the command line again: in a multirun, each would run the whole sweep.
Where one of them fails it kills the first, which would be the sweep, and its port stays in the
environment of the next job. So the process that Hydra has started runs the job as a command of its
own, a single run into the folder that is there already, and Lightning starts the others from that.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from lightning_qat.errors import UserError
from lightning_qat.overrides import as_typed, quoted

FIRST_SPEAKS_WITHIN = 10  # seconds, by which processes started together may be apart
_WATCHED = "LIGHTNING_QAT_WATCHED"
_OPTIONS = {"main": "--config-path", "command-line": "--config-dir"}


def launched() -> tuple[int, int]:
    """Rank and number of the processes that torchrun or srun started; (0, 1) if this is alone.

    They are told by what Lightning's TorchElasticEnvironment and SLURMEnvironment look at, which
    would import torch.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env.get("SLURM_PROCID", "0")), int(env["SLURM_NTASKS"])
    return 0, 1


def rank() -> int:
    """Of this process among those of its job, as far as it is known before Lightning's setup."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_watched() else launched()[0]


def refused(config: DictConfig) -> str | None:
    """Why this command cannot run in the processes that there are, and what to do."""
    _, count = launched()
    if count == 1:
        return None
    if config.hydra.mode == RunMode.MULTIRUN:
        return (
            f"a sweep starts the processes of each job itself, and here are {count} that torchrun "
            "or srun has started: leave torchrun or srun out, or leave -m out."
        )
    if not _several(config):
        return (
            f"torchrun or srun has started {count} processes, and this configuration is for one: "
            "add trainer=ddp (without GPUs: trainer=ddp_cpu), or start one process only. (In a "
            "SLURM job of several tasks, one process without srun counts as all: srun -n1.)"
        )
    if "${now:" in OmegaConf.to_yaml(config.hydra.run):
        return (
            f"torchrun or srun has started {count} processes, which cannot agree on a run folder "
            "named by the time: add hydra.run.dir=outputs/runs/NAME."
        )
    return None


def wanted(cfg: DictConfig) -> bool:
    """Whether the job is to run in processes of its own, and this is not one of them.

    Raises:
        UserError: they are to be on several machines, and this command is alone.
    """
    if is_watched() or launched()[1] > 1:
        return False
    if OmegaConf.select(cfg, "trainer.num_nodes") not in (None, 1):
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}, and this command has been started on one "
            "machine only: start it with srun, or with torchrun on each machine."
        )
    return _several(cfg)


def _several(cfg: DictConfig) -> bool:
    devices, strategy = (OmegaConf.select(cfg, f"trainer.{x}") for x in ("devices", "strategy"))
    return devices != 1 or strategy not in (None, "auto")


def is_watched() -> bool:
    """Whether another process waits for this job, and says what went wrong in it."""
    return _WATCHED in os.environ


def run(hydra: HydraConf, script: Path) -> int:
    """Run this one job in its own processes; gives the exit status of the first of them.

    Args:
        hydra: its configuration.
        script: the absolute path of what the user has started.
    """
    sources = [source for source in hydra.runtime.config_sources if source.provider in _OPTIONS]
    overrides = [*as_typed(hydra.overrides.hydra), *as_typed(hydra.overrides.task)]
    command = [
        sys.executable,
        str(script),
        f"--config-name={hydra.job.config_name}",
        *(f"{_OPTIONS[source.provider]}={source.path}" for source in sources),
        *(override for override in overrides if not override.startswith("hydra.mode=")),
        f"hydra.run.dir={quoted(hydra.runtime.output_dir)}",
        "hydra.output_subdir=null",  # it is written already
    ]
    environment = os.environ | {_WATCHED: "1"}
    # Lightning would take the one task of a SLURM job for all the processes that there will be
    environment.pop("SLURM_NTASKS", None)
    # leaving the block closes the pipe, also where this process is killed: see `begin`
    with subprocess.Popen(
        command, cwd=get_original_cwd(), env=environment, stdin=subprocess.PIPE
    ) as first:
        return first.wait()


def begin() -> None:
    """Let the first process speak for all, and none outlive the one that watches it."""
    if rank() > 0:
        logging.disable(logging.WARNING)  # the first process says the same
    if is_watched():
        threading.Thread(target=_end_at_end_of_file, daemon=True).start()


def let_the_first_speak() -> None:
    """Where this process has failed: most mistakes are common to all, and one tells of them."""
    if not is_watched() and rank() > 0:
        time.sleep(FIRST_SPEAKS_WITHIN)  # torchrun ends this one when the first has failed, too


def _end_at_end_of_file() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock Python wants when it shuts down
    os._exit(1)
