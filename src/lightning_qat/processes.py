"""A job on several devices: Lightning's processes, and the one before them that only waits.

Lightning starts its other processes by running the command line again: in a multirun, each would
run the whole sweep. Where one of them fails it kills the first, which would be the sweep, and its
port stays in the environment of the next job. So the process that Hydra has started runs the job
as a command of its own, a single run into the folder that is there already, and Lightning starts
the others from that.
"""

import logging
import os
import subprocess
import sys
import threading

from hydra.conf import HydraConf
from hydra.utils import get_original_cwd, to_absolute_path
from omegaconf import DictConfig, OmegaConf

_WATCHED = "LIGHTNING_QAT_WATCHED"
_OPTIONS = {"main": "--config-path", "command-line": "--config-dir"}


def wanted(cfg: DictConfig) -> bool:
    """Whether the job is to run in processes of its own, and this is not one of them."""
    devices, strategy = (OmegaConf.select(cfg, f"trainer.{x}") for x in ("devices", "strategy"))
    return not is_one() and (devices != 1 or strategy not in (None, "auto"))


def is_one() -> bool:
    """Whether this is one of a job's own processes."""
    return _WATCHED in os.environ


def run(hydra: HydraConf) -> int:
    """Run this one job in its own processes; gives the exit status of the first of them."""
    sources = [source for source in hydra.runtime.config_sources if source.provider in _OPTIONS]
    overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
    command = [
        sys.executable,
        to_absolute_path(sys.argv[0]),
        f"--config-name={hydra.job.config_name}",
        *(f"{_OPTIONS[source.provider]}={source.path}" for source in sources),
        *(override for override in overrides if not override.startswith("hydra.mode=")),
        f'hydra.run.dir="{hydra.runtime.output_dir}"',
        "hydra.output_subdir=null",  # it is written already
    ]
    environment = os.environ | {_WATCHED: "1"}
    # leaving the block closes the pipe, also where this process is killed: see `begin`
    with subprocess.Popen(
        command, cwd=get_original_cwd(), env=environment, stdin=subprocess.PIPE
    ) as first:
        return first.wait()


def begin() -> None:
    """Make this process end, whatever it waits for, when the watching one is done or gone."""

    def end_at_end_of_file() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock Python wants when it shuts down
        os._exit(1)

    threading.Thread(target=end_at_end_of_file, daemon=True).start()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        logging.disable(logging.WARNING)  # the first process says the same
