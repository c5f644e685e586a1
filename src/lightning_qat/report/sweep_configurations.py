"""Group runs that differ only in their seed into one configuration with figures and intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_qat.overrides import HOW_IT_IS_RUN
from lightning_qat.report.intervals import student, unpaired_noise, wilson
from lightning_qat.report.sweep_runs import Run

LEAST_SEEDS = 3  # from this number on, the interval comes from the seeds

# Arguments that do not make another configuration.
_NOT_OF_IT = ("seed", *HOW_IT_IS_RUN)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: 0..1, or a difference of two such values.
        ends: the two ends of the interval; None = not known.
        how: method of the interval, or the reason why there is none.
    """

    value: float
    ends: tuple[float, float] | None
    how: str


@dataclass(frozen=True)
class Latency:
    """Latency of the fastest runtime of a configuration, for one image on one thread.

    Attributes:
        runtime: ``torchscript``, ``onnx``.
        p50: milliseconds.
        to_eager: the median, divided by the median of the eager FP32 network in the same rounds.
    """

    runtime: str
    p50: float
    to_eager: float


@dataclass(eq=False)
class Configuration:
    """Finished runs with the same arguments, one per seed.

    Attributes:
        label: the arguments in which it differs from the other configurations of the sweep.
        layer: the only quantized layer; None = more than one layer may be quantized.
        latency: None = not measured.
    """

    label: str
    layer: str | None
    runs: list[Run]
    latency: Latency | None = None

    @property
    def network(self) -> str:
        """Return the network that counts: ``int8``, or ``fp32`` if nothing is quantized."""
        return "int8" if "int8" in self.runs[0].metrics["accuracy"] else "fp32"

    @property
    def seeds(self) -> list[int]:
        """Return the seeds, in the order of the runs."""
        return [run.metrics["seed"] for run in self.runs]

    @property
    def accuracy(self) -> Estimate:
        """Return the test accuracy: Student's t over the seeds, else Wilson over the images."""
        shares = self._all("accuracy", self.network)
        if len(shares) >= LEAST_SEEDS:
            low, high = student(shares)
            ends = max(0.0, low), min(1.0, high)
            return Estimate(fmean(shares), ends, f"t over {len(shares)} seeds")
        share, images = fmean(shares), self.runs[0].metrics["test_images"]
        return Estimate(share, wilson(share, images), f"Wilson, {images} images")

    @property
    def fp32_accuracy(self) -> float:
        """Return the FP32 accuracy on the test set, as the mean over the seeds."""
        return fmean(self._all("accuracy", "fp32"))

    @property
    def gap(self) -> Estimate | None:
        """Return INT8 - FP32 on the test set, seed by seed; None if nothing is quantized."""
        if self.network == "fp32":
            return None
        gap = self._difference(self._all("accuracy", "int8"), self._all("accuracy", "fp32"))
        recorded = self.runs[0].metrics.get("difference", {}).get("int8_vs_fp32")
        if len(self.runs) > 1 or recorded is None:
            return gap
        return Estimate(gap.value, (recorded["low"], recorded["high"]), "one seed, paired images")

    @property
    def validation(self) -> float | None:
        """Return the accuracy on the validation images, mean over the seeds; None if unknown."""
        if any("validation" not in run.metrics for run in self.runs):
            return None
        shares = [run.metrics["validation"]["accuracy"].get(self.network) for run in self.runs]
        return None if None in shares else fmean(shares)

    @property
    def divergence(self) -> float | None:
        """Return the mean KL(FP32 || INT8) on the validation images, in nats."""
        values = [run.metrics.get("validation", {}).get("divergence") for run in self.runs]
        return None if None in values else fmean(values)

    @property
    def validation_gap(self) -> Estimate | None:
        """Return INT8 - FP32 on the validation images."""
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
        """Return the bytes of the TorchScript file."""
        return self.runs[0].metrics["size_bytes"][self.network]

    @property
    def packed_bytes(self) -> int | None:
        """Return the bytes with each weight packed at its bits, or None if not known."""
        return self.runs[0].metrics["size_bytes"].get(f"{self.network}_packed")

    @property
    def megabytes(self) -> float:
        """Return the packed size, else the size of the file; a megabyte is 1,000,000 bytes."""
        return (self.packed_bytes or self.file_bytes) / 1e6

    @property
    def folder(self) -> Path:
        """Return the folder of its first run."""
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
        """Return the mean of the differences, with a t interval if there are enough seeds."""
        each = [x - y for x, y in zip(ours, theirs, strict=True)]
        if len(each) >= LEAST_SEEDS:
            return Estimate(fmean(each), student(each), f"t over {len(each)} seeds")
        return Estimate(fmean(each), None, "one seed" if len(each) == 1 else "two seeds")


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """Return the finished runs by configuration, in the order of the jobs."""
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        if not run.status:
            key = tuple(x for x in run.overrides if _name(x) not in _NOT_OF_IT)
            # A sampler may try the same values twice. Keep the last run of each seed.
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
