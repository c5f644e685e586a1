"""Choose the best configurations: the Pareto front, and the best within a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_qat.report.sweep_configurations import Configuration

# Two runs of one network on one machine can differ by this factor.
LEVEL = 1.05

Score = Callable[[Configuration], float]


def megabytes(configuration: Configuration) -> float:
    """Return the size that the choice uses."""
    return configuration.megabytes


def milliseconds(configuration: Configuration) -> float:
    """Return the median of the fastest runtime, or infinity if nothing was timed."""
    return configuration.latency.p50 if configuration.latency else math.inf


_TOLERANCES = {megabytes: 1.0, milliseconds: LEVEL}


def candidates(configurations: Sequence[Configuration]) -> tuple[list[Configuration], str]:
    """Return the configurations to choose from. If there are none, also return the reason."""
    found = [x for x in configurations if x.network == "int8" and x.layer is None]
    if not found:
        return [], "no configuration has a whole network in INT8"
    if len({x.runs[0].metrics["data"] for x in found}) > 1:
        return [], "the runs are of several data sets, and their accuracies cannot be compared"
    return found, ""


def score(configurations: Sequence[Configuration]) -> tuple[Score, bool]:
    """Return the score to choose by (higher is better), and True if it uses validation images.

    It uses them unless one of the configurations has no validation accuracy.
    """
    if all(x.validation is not None for x in configurations):
        return (lambda x: x.validation or 0.0), True
    return (lambda x: x.accuracy.value), False


def front(
    configurations: Sequence[Configuration], score: Score, costs: Sequence[Callable[..., float]]
) -> list[Configuration]:
    """Return the configurations that no other one beats.

    Another configuration beats one if it is not worse in accuracy and in each cost, and better in
    at least one of them.

    Args:
        costs: the costs that count: ``megabytes``, ``milliseconds`` or both.
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
    """Limits for the cost of a model.

    Attributes:
        megabytes: size of the weights, packed if that size is known; None = no limit.
        milliseconds: time for one image on one thread; None = no limit.
    """

    megabytes: float | None
    milliseconds: float | None

    def answer(self, configurations: Sequence[Configuration]) -> str | None:
        """Return a sentence that names the best configuration in the budget; None without a budget.

        Args:
            configurations: all configurations of the sweep.
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
