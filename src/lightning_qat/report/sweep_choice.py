"""Which configuration is the best: the Pareto front, and the best within a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_qat.report.sweep_configurations import Configuration

# Latencies closer than this are the same to two runs of one network on one machine.
LEVEL = 1.05

Score = Callable[[Configuration], float]


def megabytes(configuration: Configuration) -> float:
    """The size that counts."""
    return configuration.megabytes


def milliseconds(configuration: Configuration) -> float:
    """Median of the fastest runtime; infinite where nothing was timed."""
    return configuration.latency.p50 if configuration.latency else math.inf


_TOLERANCES = {megabytes: 1.0, milliseconds: LEVEL}


def candidates(configurations: Sequence[Configuration]) -> tuple[list[Configuration], str]:
    """Those to choose among, and where there are none, why."""
    found = [x for x in configurations if x.network == "int8" and x.layer is None]
    if not found:
        return [], "no configuration has a whole network in INT8"
    if len({x.runs[0].metrics["data"] for x in found}) > 1:
        return [], "the runs are of several data sets, whose accuracies cannot be compared"
    return found, ""


def score(configurations: Sequence[Configuration]) -> tuple[Score, bool]:
    """What to choose by, higher is better, and whether it is of validation images.

    It is, unless one of the configurations has none.
    """
    if all(x.validation is not None for x in configurations):
        return (lambda x: x.validation or 0.0), True
    return (lambda x: x.accuracy.value), False


def front(
    configurations: Sequence[Configuration], score: Score, costs: Sequence[Callable[..., float]]
) -> list[Configuration]:
    """Those that no other one beats: as accurate at no more cost, and better in something.

    Args:
        costs: of ``megabytes`` and ``milliseconds``, those that count.
    """

    def beats(one: Configuration, other: Configuration) -> bool:
        pairs = [(cost(one), cost(other), _TOLERANCES[cost]) for cost in costs]
        return (
            score(one) >= score(other)
            and all(ours <= theirs * level for ours, theirs, level in pairs)
            and (
                score(one) > score(other)
                or any(ours * level < theirs for ours, theirs, level in pairs)
            )
        )

    return [x for x in configurations if not any(beats(y, x) for y in configurations)]


@dataclass(frozen=True)
class Budget:
    """The most that a model may cost.

    Attributes:
        megabytes: of its weights, packed where that is known; None = any.
        milliseconds: for one image on one thread; None = any.
    """

    megabytes: float | None
    milliseconds: float | None

    def answer(self, configurations: Sequence[Configuration]) -> str | None:
        """A sentence that names the best within it; None where no budget was given.

        Args:
            configurations: all of the sweep.
        """
        limits = [
            (name, unit, cost, most)
            for name, unit, cost, most in (
                ("size", "MB", megabytes, self.megabytes),
                ("latency", "ms", milliseconds, self.milliseconds),
            )
            if most is not None
        ]
        if not limits:
            return None
        within = " and ".join(f"{most:g} {unit}" for _, unit, _, most in limits)
        found, why_none = candidates(configurations)
        if not found:
            return f"none within {within}: {why_none}"
        by, _ = score(found)

        def excess(configuration: Configuration) -> float:
            return max(cost(configuration) / most for _, _, cost, most in limits)

        fitting = [x for x in found if excess(x) <= 1]
        if fitting:
            best = max(fitting, key=lambda x: (by(x), -excess(x)))
            return f"best within {within}: {best.label} ({_figures(best)})"
        nearest = min(found, key=excess)
        if math.isinf(excess(nearest)):
            return f"none is known to fit within {within}: no latency was measured"
        return f"none fits within {within}; nearest: {nearest.label} ({_figures(nearest)})"


def _figures(configuration: Configuration) -> str:
    figures = [
        f"{configuration.accuracy.value:.2%} on the test set",
        f"{configuration.megabytes:.2f} MB",
    ]
    if configuration.latency:
        figures.append(f"{configuration.latency.p50:.2f} ms")
    return ", ".join(figures)
