"""Detect the phase of a run from outside, by its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIT_ENDED = "`Trainer.fit` stopped"


@dataclass(frozen=True)
class Phase:
    """A phase that begins when a file, or a line in the log of the run, appears."""

    name: str
    begins: str = ""

    def has_begun(self, out: Path) -> bool:
        if not self.begins:
            return True
        if self.begins == FIT_ENDED:
            log = out / "run" / "train.log"
            return log.exists() and FIT_ENDED in log.read_text(errors="replace")
        return any(out.glob(self.begins))  # names that begin with a dot, too


STARTING = Phase("starting")
LOADING = Phase("loading", "run/train.log")
TRAINING = Phase("training", "run/csv/hparams.yaml")
CHECKPOINTING = Phase("checkpointing", "run/checkpoints/*")
SECOND_EPOCH = Phase("second epoch", "run/checkpoints/last.ckpt")
CONVERTING = Phase("converting", FIT_ENDED)
EXPORTING = Phase("exporting", "run/*model_int8.ts*")  # also the unfinished file
MEASURING = Phase("measuring", "run/model_int8.xml")
REPORTING = Phase("reporting", "run/metrics.json")
DONE = Phase("done", "run/report.html")

FP32 = (
    *(STARTING, LOADING, TRAINING, CHECKPOINTING, SECOND_EPOCH),
    Phase("keeping the weights", FIT_ENDED),
    Phase("measuring", "fp32/*.ckpt"),
    *(REPORTING, DONE),
)
PTQ = (
    *(STARTING, LOADING),
    Phase("calibrating", TRAINING.begins),
    *(CONVERTING, EXPORTING, REPORTING, DONE),
)
QAT = (
    *(STARTING, LOADING, TRAINING, CHECKPOINTING, SECOND_EPOCH),
    *(CONVERTING, EXPORTING, MEASURING, REPORTING, DONE),
)
CIFAR10 = (
    *(STARTING, LOADING),
    Phase("unpacking and decoding", "root/cifar10.npz.lock"),
    Phase("caching", "root/cifar10.np*[dz]"),
    Phase("training", "root/cifar10.npz"),
    DONE,
)
FETCHED = (
    *(STARTING, LOADING),
    Phase("fetching", "root/.cifar10-download-*"),
    Phase("unpacking and decoding", "fetched"),
    Phase("caching", "root/cifar10.np*[dz]"),
    Phase("training", "root/cifar10.npz"),
    DONE,
)


def reached(phases: Sequence[Phase], out: Path) -> Phase:
    """The last phase that has begun."""
    return next(phase for phase in reversed(phases) if phase.has_begun(out))
