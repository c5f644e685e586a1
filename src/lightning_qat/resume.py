"""resume=true: find the unfinished part of an interrupted run or sweep.

Three kinds of files, each written completely or not at all, say what a folder holds: metrics.json
names the command of a finished run, each checkpoint holds the arguments that made it, and
arguments.json holds the arguments of a sweep. The folder .hydra/ is not used, because Hydra writes
it again whenever it calls a job. Each job is checked where it runs, because a launcher may start it
on another machine.

If there is nothing to resume, the job starts from the beginning. So a script can always use
resume=true.
"""

import json
import logging
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_qat import in_use, processes
from lightning_qat.atomic import atomic_path
from lightning_qat.errors import UserError
from lightning_qat.overrides import as_typed, of_a_sweep, of_the_job

SWEEP_FILE = "arguments.json"
FAILURE_FILE = "failure.json"

# Hydra arguments that change the sweep. All other Hydra arguments may differ on a resume.
_OF_THE_SWEEP = (
    "hydra/sweeper",
    "hydra.sweeper.params",
    "hydra.sweeper.sampler",
    "hydra.sweep.subdir",
)

log = logging.getLogger(__name__)

Arguments = dict[str, str]


def refused_run(config: DictConfig) -> str | None:
    """Return why this single run cannot start or resume and what to do, or None."""
    message = _not_a_switch(config)
    if message or processes.is_watched():
        return message
    folder = Path(config.hydra.run.dir)
    if not processes.rank() and (in_use.is_in_use(folder) or in_use.is_in_use(folder.parent)):
        return in_use.refusal(folder)
    if not config.resume:
        return _overwrites(config, folder)
    if _is_named_by_time(config.hydra.run):
        return _nowhere("hydra.run.dir=FOLDER", "run")
    try:
        refuse_another_job(folder, as_typed(config.hydra.overrides.task))
    except UserError as error:
        return f"{error} Resume with the same arguments, or name another folder."
    return None


def refused_sweep(config: DictConfig) -> str | None:
    """Return why this sweep cannot start in its folder and what to do, or None."""
    folder = Path(config.hydra.sweep.dir)
    message = _not_a_switch(config) or _empty(config)
    if message:
        return message
    if config.resume and _is_named_by_time(config.hydra.sweep):
        return _nowhere("hydra.sweep.dir=FOLDER", "sweep")
    if config.hydra.output_subdir != ".hydra":
        return (
            f"hydra.output_subdir={config.hydra.output_subdir} is not permitted in a sweep: its "
            "report and resume=true know its jobs by .hydra/. Leave this argument out."
        )
    if any(in_use.is_in_use(place) for place in (folder, *folder.glob("*/"))):
        return in_use.refusal(folder)
    if not any(folder.glob("*/.hydra/hydra.yaml")):
        return None
    if not config.resume:
        return (
            f"{folder} holds a sweep already, whose results this one would overwrite: add "
            "resume=true to continue it, or name another folder with hydra.sweep.dir=FOLDER."
        )
    then, now = _read(folder / SWEEP_FILE), _sweep_arguments(config)
    if then is None:
        return (
            f"{folder} holds jobs but no {SWEEP_FILE}: they do not belong to one sweep, or an "
            "older version made them. They cannot be resumed: name another folder."
        )
    if list(then.items()) != list(now.items()):  # the order of the arguments numbers the jobs
        return (
            f"{folder} holds another sweep: {difference(then, now)}. Resume it with the same "
            "arguments, or name another folder with hydra.sweep.dir=FOLDER."
        )
    return None


def record_sweep(config: DictConfig) -> None:
    """Write the arguments of the sweep to its folder."""
    with atomic_path(Path(config.hydra.sweep.dir) / SWEEP_FILE) as partial:
        partial.write_text(json.dumps(_sweep_arguments(config), indent=2) + "\n")


def is_finished(folder: Path, overrides: Iterable[str]) -> bool:
    """Return True if this job is finished in this folder."""
    return (
        _finished_with(folder) == arguments(overrides)
        and (folder / "report.html").is_file()  # the last file of a run
        and not (folder / FAILURE_FILE).exists()
    )


def refuse_shared_folder(cfg: DictConfig, hydra: HydraConf) -> None:
    """Check that each job of a sweep has its own folder, directly in the folder of the sweep.

    Raises:
        UserError: another job of this sweep has used the folder, or the folder is elsewhere.
    """
    if hydra.mode != RunMode.MULTIRUN:
        return
    folder, overrides = Path(hydra.runtime.output_dir), as_typed(hydra.overrides.task)
    if folder.resolve().parent != Path(hydra.sweep.dir).resolve():
        raise UserError(
            f"hydra.sweep.subdir={hydra.sweep.subdir} is not the name of one folder: reports and "
            "resume=true find only jobs directly in the folder of the sweep. Use a name such as "
            "${hydra.job.num}."
        )
    done, now = _finished_with(folder), arguments(overrides)
    if cfg.resume and done not in (None, now):  # a search may suggest other values than before
        raise UserError(
            f"{folder} holds the results of another job: {difference(done or {}, now)}. The "
            "search suggests other values than before, for example because a job that failed now "
            "succeeds. Start it again in another folder, hydra.sweep.dir=FOLDER."
        )
    if not cfg.resume:  # the folder of the sweep was empty at its start
        try:
            refuse_another_job(folder, overrides)
        except UserError as error:
            raise UserError(
                f"{error} Both are jobs of this sweep: put ${{hydra.job.num}} into "
                "hydra.sweep.subdir, and name another folder with hydra.sweep.dir=FOLDER."
            ) from error


def prepare(cfg: DictConfig, hydra: HydraConf) -> None:
    """Continue the job from its own last checkpoint if resume=true and the arguments match."""
    if not cfg.resume:
        return
    folder, overrides = Path(hydra.runtime.output_dir), as_typed(hydra.overrides.task)
    last = folder / "checkpoints" / "last.ckpt"
    try:  # its own checkpoint is newer than one that the user named
        if _trained_with(last) == arguments(overrides):
            log.info("goes on from %s", last)
            cfg.ckpt_path = str(last)
    except UserError as error:
        log.warning("starts again: %s", error)


def refuse_another_job(folder: Path, overrides: Iterable[str]) -> None:
    """Check that the content of the folder, if any, was made with these arguments.

    Raises:
        UserError: the folder holds a run with other arguments.
    """
    try:
        trained = _trained_with(folder / "checkpoints" / "last.ckpt")
    except UserError:
        trained = None
    found = [x for x in (trained, _finished_with(folder)) if x is not None]
    now = arguments(overrides)
    if found and now not in found:
        raise UserError(f"{folder} holds another run: {difference(found[0], now)}.")


def _finished_with(folder: Path) -> Arguments | None:
    metrics = _read(folder / "metrics.json")
    if not metrics or metrics.get("status") != 0:
        return None
    return arguments(shlex.split(metrics.get("command", ""))[2:])  # after "python train.py"


def _trained_with(checkpoint: Path) -> Arguments | None:
    if not checkpoint.exists():
        return None
    from lightning_qat.made_with import made_with  # imports torch

    return arguments(made_with(checkpoint))


def _sweep_arguments(config: DictConfig) -> Arguments:
    task, of_hydra = as_typed(config.hydra.overrides.task), as_typed(config.hydra.overrides.hydra)
    return arguments([*task, *(x for x in of_hydra if x.lstrip("+~").startswith(_OF_THE_SWEEP))])


def arguments(overrides: Iterable[str]) -> Arguments:
    """Return the values by name of all arguments that change the result of the job."""
    pairs = (override.partition("=") for override in of_the_job(list(overrides)))
    return {name: value for name, _, value in pairs}


def difference(then: Arguments, now: Arguments) -> str:
    """Describe in words the arguments that differ."""
    names = [name for name in then | now if then.get(name) != now.get(name)]
    if not names:
        return "the same arguments in another order, and the order numbers the jobs"
    old, new = (
        " ".join(f"{name}={args[name]}" for name in names if name in args) or "none of it"
        for args in (then, now)
    )
    return f"there {old}, here {new}"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _overwrites(config: DictConfig, folder: Path) -> str | None:
    """Return why a new run must not start in this folder, or None. An interrupted ptq may start."""
    done, now = _finished_with(folder), arguments(as_typed(config.hydra.overrides.task))
    checkpoints = folder / "checkpoints"
    goes_on = config.ckpt_path and Path(str(config.ckpt_path)).parent.resolve() == (
        checkpoints.resolve()
    )
    if done is not None and ((folder / "report.html").exists() or done != now):
        what = "a run that is finished, whose results"
    elif next(checkpoints.glob("*.ckpt"), None) and not goes_on:
        what = "a run that was broken off, whose checkpoints"
    else:
        return None
    return (
        f"{folder} holds {what} this one would overwrite: add resume=true to continue it (with the "
        "same arguments), or name another folder with hydra.run.dir=FOLDER."
    )


def _not_a_switch(config: DictConfig) -> str | None:
    if isinstance(config.resume, bool):
        return None
    return f"resume={config.resume!r} is not permitted: set it to true or false."


def _is_named_by_time(folders: DictConfig) -> bool:
    return "${now:" in OmegaConf.to_yaml(folders)


def _nowhere(argument: str, what: str) -> str:
    return (
        f"resume=true finds nothing to resume: the folder of this {what} is named by the time, so "
        f"it is a new one. Name that of the {what} to resume with {argument}."
    )


def _empty(config: DictConfig) -> str | None:
    """Return an error if a sweep argument has no value: Hydra would silently run no job."""
    for override in of_a_sweep(config):
        if override.is_discrete_sweep() and next(override.sweep_string_iterator(), None) is None:
            return (
                f"{override.input_line} matches no value, so this sweep has no job: name values "
                "that exist (python train.py --help shows the choices)."
            )
    return None
