"""Run a job on several devices: start its processes, and let one of them report.

torchrun and srun start all processes, each with the whole command line. Without them, Lightning
starts the other processes and runs the command line again. In a multirun, each process would then
run the whole sweep. If one of them fails, Lightning kills the first process, which would be the
sweep. Its port also stays in the environment of the next job. So the process that Hydra started
runs the job as a command of its own: a single run in the existing folder. Lightning starts the
other processes from that command.
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

FIRST_SPEAKS_WITHIN = 10  # seconds: the greatest difference between the starts of the processes
_WATCHED = "LIGHTNING_QAT_WATCHED"
_OPTIONS = {"main": "--config-path", "command-line": "--config-dir"}


def launched() -> tuple[int, int]:
    """Return the rank and the number of processes that torchrun or srun started, else (0, 1).

    Read the variables that Lightning's TorchElasticEnvironment and SLURMEnvironment read. Those
    classes would import torch.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env.get("SLURM_PROCID", "0")), int(env["SLURM_NTASKS"])
    return 0, 1


def rank() -> int:
    """Return the rank of this process in its job, as far as known before Lightning's setup."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_watched() else launched()[0]


def refused(config: DictConfig) -> str | None:
    """Return why this command cannot run in the present processes and what to do, or None."""
    _, count = launched()
    if count == 1:
        return None
    if config.hydra.mode == RunMode.MULTIRUN:
        return (
            f"a sweep starts the processes of each job itself, but torchrun or srun has started "
            f"{count} processes: leave torchrun or srun out, or leave -m out."
        )
    if not _several(config):
        return (
            f"torchrun or srun has started {count} processes, and this configuration is for one: "
            "add trainer=ddp (without GPUs: trainer=ddp_cpu), or start one process only. (In a "
            "SLURM job with several tasks, start one process with srun -n1.)"
        )
    if "${now:" in OmegaConf.to_yaml(config.hydra.run):
        return (
            f"torchrun or srun has started {count} processes, which cannot agree on a run folder "
            "named by the time: add hydra.run.dir=outputs/runs/NAME."
        )
    return None


def wanted(cfg: DictConfig) -> bool:
    """Return True if the job must start its own processes, and this is not one of them.

    Raises:
        UserError: the job is for several machines, but the command was started on one machine.
    """
    if is_watched() or launched()[1] > 1:
        return False
    if OmegaConf.select(cfg, "trainer.num_nodes") not in (None, 1):
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}, but this command was started on one "
            "machine only: start it with srun, or with torchrun on each machine."
        )
    return _several(cfg)


def _several(cfg: DictConfig) -> bool:
    devices, strategy = (OmegaConf.select(cfg, f"trainer.{x}") for x in ("devices", "strategy"))
    return devices != 1 or strategy not in (None, "auto")


def is_watched() -> bool:
    """Return True if another process waits for this job and reports its errors."""
    return _WATCHED in os.environ


def run(hydra: HydraConf, script: Path) -> int:
    """Run this job in its own processes, and return the exit status of the first one.

    Args:
        hydra: configuration of the job.
        script: absolute path of the script that the user started.
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
    # Otherwise Lightning would take the single SLURM task for all the processes of the job.
    environment.pop("SLURM_NTASKS", None)
    # The end of the block closes the pipe, even if this process is killed: see `begin`.
    with subprocess.Popen(
        command, cwd=get_original_cwd(), env=environment, stdin=subprocess.PIPE
    ) as first:
        return first.wait()


def begin() -> None:
    """Silence all processes but the first. End a process when the process watching it ends."""
    if rank() > 0:
        logging.disable(logging.WARNING)  # the first process says the same
    if is_watched():
        threading.Thread(target=_end_at_end_of_file, daemon=True).start()


def let_the_first_speak() -> None:
    """Wait before this process reports an error. The first process often has the same error."""
    if not is_watched() and rank() > 0:
        time.sleep(FIRST_SPEAKS_WITHIN)  # torchrun ends this process when the first has failed, too


def _end_at_end_of_file() -> None:
    os.read(0, 1)  # not sys.stdin: Python needs its lock at shutdown
    os._exit(1)
