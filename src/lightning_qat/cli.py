"""Set the exit status: 0 = done, 2 = the user's mistake, 1 = internal error.

Hydra does not separate these cases. It ends with 1 for invalid arguments. For an exception in a job
it prints a traceback and skips the next jobs. So the task catches the errors of its job and writes
them to a file, and this module turns the file into a status. In a multirun, ``report.sweep`` turns
all files into the worst status.
"""

import errno
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_qat import in_use, interrupt, processes, resume, search, sweep_stages
from lightning_qat.atomic import atomic_path
from lightning_qat.errors import UserError
from lightning_qat.overrides import as_typed
from lightning_qat.report.metrics import read_objective
from lightning_qat.resume import FAILURE_FILE

DONE, OUR_FAULT, USERS_MISTAKE = 0, 1, 2

# Config file of a Hydra plugin -> the extra of this package that installs the plugin.
_EXTRAS = {
    "hydra/sweeper/optuna": "optuna",
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray",
}

# Errors that the disk causes, not the program.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

log = logging.getLogger(__name__)
_status_is_ours = False
_until_the_end = ExitStack()  # holds the lock of this command's folder


class CommandCheck(Callback):
    """Stop a command before Hydra starts jobs that would fail or disturb each other."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a single run. Hydra calls this before the job starts."""
        folder, overrides = config.hydra.run.dir, config.hydra.overrides.task
        refused = processes.refused(config) or resume.refused_run(config)
        finished = config.resume is True and resume.is_finished(Path(folder), as_typed(overrides))
        if finished and refused is None:
            if not processes.rank():
                print(f"{folder} is finished: nothing is left to do.")
            end(DONE)
        _begin_in("hydra.run.dir", folder, refused)
        if processes.rank():
            with read_write(config.hydra):
                config.hydra.output_subdir = None  # the first process writes it

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a multirun. Hydra calls this before the first job starts."""
        folder = config.hydra.sweep.dir
        refused = (
            processes.refused(config)
            or resume.refused_sweep(config)
            or sweep_stages.refused(config)
        )
        _begin_in("hydra.sweep.dir", folder, refused, config.hydra.launcher._target_)
        resume.record_sweep(config)


def _begin_in(argument: str, folder: str, message: str | None, launcher: str = "") -> None:
    if message is None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not processes.is_watched() and not processes.rank():
                _until_the_end.enter_context(in_use.alone_in(Path(folder)))
                interrupt.resumable_with(argument, folder, launcher)
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = (
                f"the output folder {folder} cannot be used: {error}. Free some space there, or "
                "name another one with output_dir=FOLDER."
            )
    if message is not None:
        processes.let_the_first_speak()
        print(message, file=sys.stderr)
        end(USERS_MISTAKE)


def worst(statuses: Iterable[int]) -> int:
    """Return the worst status: an internal error, then a user's mistake, then success."""
    return max(statuses, key=(DONE, USERS_MISTAKE, OUR_FAULT).index, default=DONE)


def job(task: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Wrap the task that Hydra calls, so that one failed job does not stop a multirun.

    With resume=true, skip a job that is finished.
    """
    # read it now: the processes of a launcher have other scripts
    script = Path(sys.argv[0]).resolve()

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> float | None:
        found: float | None = None
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        failure = folder / FAILURE_FILE
        processes.begin()
        own_folder = hydra.mode == RunMode.MULTIRUN  # a single run uses the folder of the command
        if cfg.resume and resume.is_finished(folder, as_typed(hydra.overrides.task)):
            log.info("%s is finished: skipped", folder)
            return read_objective(folder)
        if not processes.rank():
            failure.unlink(missing_ok=True)
        status = DONE
        try:
            with in_use.alone_in(folder) if own_folder else nullcontext():
                if search.is_one(hydra):
                    search.check(cfg)
                resume.refuse_shared_folder(cfg, hydra)
                if processes.wanted(cfg):
                    _run_in_processes(hydra, script, failure)
                    found = read_objective(folder)
                else:
                    resume.prepare(cfg, hydra)
                    found = task(cfg)
        except Exception as error:
            if interrupt.was_received():  # another exception has replaced the KeyboardInterrupt
                raise KeyboardInterrupt from error
            processes.let_the_first_speak()
            if not failure.exists():  # otherwise another process has failed and written the reason
                status = _tell(error, failure)
        if failure.exists():
            status = json.loads(failure.read_text())["status"]
        if status and hydra.mode == RunMode.RUN:
            end(status)
        return search.WORST if status and search.is_one(hydra) else found

    return guarded


def _tell(error: Exception, failure: Path) -> int:
    message = users_mistake(error)
    if message is None:
        status, message = OUR_FAULT, f"{type(error).__name__}: {error}"
        log.error("%s", traceback.format_exc())
    else:
        status = USERS_MISTAKE
        # otherwise the process that waits for all of them reports it
        if not processes.is_watched():
            log.error("%s", message)
    with suppress(OSError), atomic_path(failure) as partial:  # a full disk has no space for it
        partial.write_text(json.dumps({"status": status, "message": message}) + "\n")
    return status


def _run_in_processes(hydra: HydraConf, script: Path, failure: Path) -> None:
    status = processes.run(hydra, script)
    if failure.exists():
        log.error("%s", json.loads(failure.read_text())["message"])
    elif status:
        raise RuntimeError(f"the first process of this job ended with {status} and no message")


def end(status: int) -> NoReturn:
    """End the process with a status of this program, so that ``run`` does not replace it."""
    global _status_is_ours
    _status_is_ours = True
    sys.exit(status)


def run(main: Callable[[], None]) -> None:
    """Call the function that ``hydra.main`` made.

    Replace the status of Hydra's own errors by 2, and the status of an interrupted command by 128 +
    the number of the signal.
    """
    global _status_is_ours
    _status_is_ours = False
    with interrupt.handled():
        try:
            with _until_the_end:
                _run(main)
        except (KeyboardInterrupt, SystemExit):
            if not interrupt.was_received():
                raise
            sys.exit(interrupt.tell())


def _copy_sources_once() -> None:
    """Copy Hydra's config sources once for the help, not once for each group. It saves seconds."""
    copied = ConfigLoaderImpl._parse_overrides_and_create_caching_repo
    kept: dict[Any, Any] = {}

    def once(self: Any, config_name: str | None, overrides: list[str]) -> Any:
        key = config_name, *overrides
        if key not in kept:
            kept[key] = copied(self, config_name, overrides)
        return kept[key]

    ConfigLoaderImpl._parse_overrides_and_create_caching_repo = once  # type: ignore[method-assign]


def _run(main: Callable[[], None]) -> None:
    if {"--help", "-h"} & set(sys.argv):  # Hydra prints the help and ends
        _copy_sources_once()
    try:
        main()
    except SystemExit as exit_:
        if exit_.code and not _status_is_ours and not interrupt.was_received():
            # Hydra ends the process in its exception handler, and the exception names the missing
            # file.
            extra = _EXTRAS.get(getattr(exit_.__context__, "missing_cfg_file", None) or "")
            if extra:
                print(
                    f"This needs a plugin of Hydra: pip install 'lightning_qat[{extra}]'.",
                    file=sys.stderr,
                )
            sys.exit(USERS_MISTAKE)
        raise


def users_mistake(error: BaseException | None) -> str | None:
    """Return the message for the user if the cause is the user's mistake, else None."""
    while error is not None:
        if isinstance(error, UserError | OmegaConfBaseException):
            return str(error)
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            return (
                f"{error.filename or 'a file of this run'} cannot be written: {error.strerror}. "
                "Free some space there, or make it writable, and continue with resume=true and "
                "hydra.run.dir=FOLDER; or name other places with output_dir=FOLDER, fp32_ckpt=FILE."
            )
        # Lightning's exception for invalid values
        if type(error).__name__ == "MisconfigurationException":
            return (
                f"Lightning refuses this configuration: {error} See `python train.py --cfg job` "
                "(with the same arguments); trainer=auto takes what this machine has."
            )
        if isinstance(error, InstantiationException):
            if "unexpected keyword" in str(error):
                return f"an override names something that does not exist: {error}"
            if "__init__() missing" in str(error):
                return f"an override removes something that is needed: {error}"
            if "full_key: trainer" in str(error) and not isinstance(error.__cause__, UserError):
                task = HydraConfig.get().overrides.task
                given = [x for x in task if x.lstrip("+~").startswith("trainer")]
                return (
                    f"Lightning refuses a value of trainer.*: {error}\nYou set "
                    f"{' '.join(given) or 'none'}; trainer=auto takes what this machine has."
                )
        if str(error).startswith("You set `"):  # Lightning: torchrun or srun started another number
            return (
                f"Lightning refuses the number of processes: {error} Set trainer.devices to the "
                "number on one machine, and trainer.num_nodes to the number of machines."
            )
        if "different number of parameter groups" in str(error):
            return (
                "the checkpoint in ckpt_path is from an older version, which trained in another "
                "way: start again. You may start from its weights (model.weights=FILE)."
            )
        if "failed to create QNNPACK" in str(error):
            return (
                "QNNPACK cannot add these tensors, because their scales differ too much (by 2^14 "
                "or more, or 2^8 the other way): keep the branch that is nearly 0 in float with "
                "overrides, or use qconfig=x86."
            )
        if "Expected more than 1 value per channel" in str(error):
            return "batch-norm cannot train on one image per step: raise data.batch_size."
        if "Error(s) in loading state_dict" in str(error) and isinstance(error, RuntimeError):
            return (
                "the checkpoint in ckpt_path belongs to another run (another stage, model or "
                f"class count): {str(error).splitlines()[0]} Name the last.ckpt of the run to "
                "continue."
            )
        error = error.__cause__
    return None
