"""Runs that differ in their seed only are one configuration: its figures and their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_qat.overrides import HOW_IT_IS_RUN
from lightning_qat.report.intervals import student, unpaired_noise, wilson
from lightning_qat.report.sweep_runs import Run

LEAST_SEEDS = 3  # from which on the seeds themselves tell how much they differ

# Arguments that make no other configuration.
_NOT_OF_IT = ("seed", *HOW_IT_IS_RUN)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: 0..1, or a difference of such.
        ends: of the interval; None = not known.
        how: by which the interval was found, or why there is none.
    """

    value: float
    ends: tuple[float, float] | None
    how: str


@dataclass(frozen=True)
class Latency:
    """Of the fastest runtime of a configuration, one image on one thread.

    Attributes:
        runtime: ``torchscript``, ``onnx``.
        p50: milliseconds.
        to_eager: the median, divided by that of the FP32 network in eager in the same rounds.
    """

    runtime: str
    p50: float
    to_eager: float


@dataclass(eq=False)
class Configuration:
    """Finished runs of the same arguments, one a seed.

    Attributes:
        label: the arguments by which it differs from the others of the sweep.
        layer: the only one that was quantized; None = not such a run.
        latency: None = not measured.
    """

    label: str
    layer: str | None
    runs: list[Run]
    latency: Latency | None = None

    @property
    def network(self) -> str:
        """Which network of its runs counts: ``int8`` or, where nothing is quantized, ``fp32``."""
        return "int8" if "int8" in self.runs[0].metrics["accuracy"] else "fp32"

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return [run.metrics["seed"] for run in self.runs]

    @property
    def accuracy(self) -> Estimate:
        """On the test set: Student's t over the seeds, else Wilson over the images."""
        shares = self._all("accuracy", self.network)
        if len(shares) >= LEAST_SEEDS:
            low, high = student(shares)
            ends = max(0.0, low), min(1.0, high)
            return Estimate(fmean(shares), ends, f"t over {len(shares)} seeds")
        share, images = fmean(shares), self.runs[0].metrics["test_images"]
        return Estimate(share, wilson(share, images), f"Wilson, {images} images")

    @property
    def fp32_accuracy(self) -> float:
        """Mean over the seeds, on the test set."""
        return fmean(self._all("accuracy", "fp32"))

    @property
    def gap(self) -> Estimate | None:
        """INT8 - FP32 on the test set, seed by seed; None where nothing is quantized."""
        if self.network == "fp32":
            return None
        gap = self._difference(self._all("accuracy", "int8"), self._all("accuracy", "fp32"))
        recorded = self.runs[0].metrics.get("difference", {}).get("int8_vs_fp32")
        if len(self.runs) > 1 or recorded is None:
            return gap
        return Estimate(gap.value, (recorded["low"], recorded["high"]), "one seed, paired images")

    @property
    def validation(self) -> float | None:
        """Accuracy on the validation images, mean over the seeds; None where there were none."""
        if any("validation" not in run.metrics for run in self.runs):
            return None
        shares = [run.metrics["validation"]["accuracy"].get(self.network) for run in self.runs]
        return None if None in shares else fmean(shares)

    @property
    def divergence(self) -> float | None:
        """Mean KL(FP32 || INT8) on the validation images, nats."""
        values = [run.metrics.get("validation", {}).get("divergence") for run in self.runs]
        return None if None in values else fmean(values)

    @property
    def validation_gap(self) -> Estimate | None:
        """INT8 - FP32 on the validation images."""
        if self.validation is None or self.network == "fp32":
            return None
        fp32 = self._all("validation", "accuracy", "fp32")
        gap = self._difference(self._all("validation", "accuracy", "int8"), fp32)
        if gap.ends is not None:
            return gap
        images = self.runs[0].metrics["validation"]["images"]
        half = unpaired_noise(self.validation, fmean(fp32), images)
        ends = gap.value - half, gap.value + half
        return Estimate(gap.value, ends, f"unpaired, {images} images")

    @property
    def file_bytes(self) -> int:
        """Of the TorchScript file."""
        return self.runs[0].metrics["size_bytes"][self.network]

    @property
    def packed_bytes(self) -> int | None:
        """With each weight packed at its bits, where that is known."""
        return self.runs[0].metrics["size_bytes"].get(f"{self.network}_packed")

    @property
    def megabytes(self) -> float:
        """Packed, else of the file; a megabyte is 1,000,000 bytes."""
        return (self.packed_bytes or self.file_bytes) / 1e6

    @property
    def folder(self) -> Path:
        """Of its first run."""
        return self.runs[0].folder

    def _all(self, *keys: str) -> list[float]:
        values: list[Any] = []
        for run in self.runs:
            value: Any = run.metrics
            for key in keys:
                value = value[key]
            values.append(value)
        return values

    @staticmethod
    def _difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
        """Mean of the seeds' differences, with their t interval where there are enough."""
        each = [x - y for x, y in zip(ours, theirs, strict=True)]
        if len(each) >= LEAST_SEEDS:
            return Estimate(fmean(each), student(each), f"t over {len(each)} seeds")
        return Estimate(fmean(each), None, "one seed" if len(each) == 1 else "two seeds")


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The finished runs by configuration, in the order of the jobs."""
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        if not run.status:
            key = tuple(x for x in run.overrides if _name(x) not in _NOT_OF_IT)
            # a sampler may try the same twice: one run a seed, the last
            groups.setdefault(key, {})[run.metrics["seed"]] = run
    shared = set.intersection(*map(set, groups)) if groups else set()
    found = []
    for key, by_seed in groups.items():
        first = next(iter(by_seed.values())).metrics
        own = [x for x in key if x not in shared]
        what = " ".join(filter(None, (f"stage={first['stage']}", _qconfig(first))))
        layer = next((x.partition("=")[2] for x in key if _name(x) == "only"), "null")
        found.append(
            Configuration(
                label=" ".join(own) or what,
                layer=None if layer == "null" else layer,
                runs=[by_seed[seed] for seed in sorted(by_seed)],
            )
        )
    return found


def _name(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _qconfig(metrics: dict[str, Any]) -> str:
    return f"qconfig={metrics['qconfig']}" if metrics["qconfig"] else ""
