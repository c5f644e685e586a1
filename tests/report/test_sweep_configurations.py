"""Seeds, intervals, the Pareto front and budgets, against calculations by hand."""

from pathlib import Path

import pytest
from scipy.stats import t

from lightning_qat.report.intervals import student, unpaired_noise, wilson
from lightning_qat.report.sweep_choice import (
    Budget,
    candidates,
    front,
    megabytes,
    milliseconds,
    score,
)
from lightning_qat.report.sweep_configurations import Configuration, Latency, configurations
from lightning_qat.report.sweep_runs import read_runs
from tests.report.sweep_folder import add_failed_job, add_job, validated


def found(sweep: Path) -> dict[str, Configuration]:
    return {x.label: x for x in configurations(read_runs(sweep))}


def test_student_is_scipys() -> None:
    low, high = t.interval(0.95, 2, loc=0.92, scale=0.02 / 3**0.5)
    assert student([0.90, 0.92, 0.94]) == pytest.approx((low, high))


def test_runs_that_differ_in_seed_are_one_configuration(tmp_path: Path) -> None:
    for seed, int8, fp32 in ((2, 0.94, 0.95), (0, 0.90, 0.92), (1, 0.92, 0.95)):
        for name in ("a", "b"):
            changes = {"accuracy__int8": int8, "accuracy__fp32": fp32}
            changes |= validated(int8, fp32=fp32)
            add_job(tmp_path, "data=digits", f"qconfig={name}", f"seed={seed}", **changes)
    changes = {"accuracy__int8": 0.94, "accuracy__fp32": 0.95} | validated(0.94)
    add_job(tmp_path, "data=digits", "qconfig=b", "seed=2", "resume=true", **changes)
    add_failed_job(tmp_path, "why", "data=digits", "qconfig=c", "seed=0")
    both = found(tmp_path)
    assert list(both) == ["qconfig=a", "qconfig=b"]
    for one in both.values():
        assert one.seeds == [0, 1, 2]
        assert one.accuracy.value == pytest.approx(0.92)
        assert one.accuracy.ends == pytest.approx(student([0.90, 0.92, 0.94]))
        assert one.accuracy.how == "t over 3 seeds"
        assert one.gap is not None
        assert one.gap.value == pytest.approx(-0.02)
        assert one.gap.ends == pytest.approx(student([-0.02, -0.03, -0.01]))
        assert one.validation == pytest.approx(0.92)
        assert one.divergence == pytest.approx(0.01)


def test_one_seed_has_the_intervals_of_its_images(tmp_path: Path) -> None:
    recorded = {"value": -0.01, "low": -0.015, "high": -0.004}
    add_job(tmp_path, "qconfig=a", difference__int8_vs_fp32=recorded, **validated(0.94))
    add_job(tmp_path, "qconfig=b")
    a, b = found(tmp_path).values()
    assert a.accuracy.ends == wilson(0.94, 2000)
    assert a.gap is not None
    assert a.gap.ends == (-0.015, -0.004)
    assert a.validation_gap is not None
    half = unpaired_noise(0.94, 0.95, 1000)
    assert a.validation_gap.ends == pytest.approx((-0.01 - half, -0.01 + half))
    assert b.gap is not None
    assert (b.gap.ends, b.gap.how) == (None, "one seed")
    assert b.validation is None
    assert b.divergence is None


def test_a_configuration_is_named_by_what_it_alone_has(tmp_path: Path) -> None:
    add_job(tmp_path, "stage=qat", "qconfig=a", "model.learning_rate=0.1")
    assert list(found(tmp_path)) == ["stage=qat qconfig=a"]
    add_job(tmp_path, "stage=qat", "qconfig=a", "model.learning_rate=0.2")
    assert list(found(tmp_path)) == ["model.learning_rate=0.1", "model.learning_rate=0.2"]


@pytest.fixture
def five(tmp_path: Path) -> dict[str, Configuration]:
    """Return configurations by name. The test set would rank them differently."""
    for name, share, size in (("a", 0.94, 9), ("b", 0.93, 9), ("c", 0.92, 4), ("d", 0.90, 4),
                              ("e", 0.80, 9)):  # fmt: skip
        add_job(tmp_path, f"qconfig={name}", accuracy__int8=1.7 - share,
                size_bytes__int8_packed=size * 10**6, **validated(share))  # fmt: skip
    named = {label.removeprefix("qconfig="): x for label, x in found(tmp_path).items()}
    for name, p50 in {"a": 1.0, "b": 0.98, "c": 2.0, "d": 1.0, "e": 0.5}.items():
        named[name].latency = Latency("onnx", p50, p50 / 4)
    return named


def test_front_holds_the_best_under_any_budget(five: dict[str, Configuration]) -> None:
    all_, why_none = candidates(list(five.values()))
    by, by_validation = score(all_)
    assert by_validation
    assert why_none == ""

    def names(*costs: object) -> str:
        return "".join(n for n, x in five.items() if x in front(all_, by, costs))  # type: ignore[arg-type]

    assert names(megabytes) == "ac"
    assert names(milliseconds) == "ae"  # b is 2 % faster than a, which counts as equal
    assert names(megabytes, milliseconds) == "acde"


@pytest.mark.parametrize(
    ("most", "answer"),
    [
        ((None, None), None),
        ((10, None), "best within 10 MB: qconfig=a (76.00% on the test set, 9.00 MB, 1.00 ms)"),
        ((5, None), "best within 5 MB: qconfig=c "),
        ((5, 1.5), "best within 5 MB and 1.5 ms: qconfig=d "),
        ((None, 0.6), "best within 0.6 ms: qconfig=e "),
        ((3.9, 1.0), "none fits within 3.9 MB and 1 ms; nearest: qconfig=d "),
        ((None, 0.1), "none fits within 0.1 ms; nearest: qconfig=e "),
    ],
)
def test_budget(
    most: tuple[float | None, float | None], answer: str | None, five: dict[str, Configuration]
) -> None:
    said = Budget(*most).answer(list(five.values()))
    assert (said or "").startswith(answer or "")
    assert (said is None) == (answer is None)


def test_what_was_not_timed_fits_no_latency(five: dict[str, Configuration]) -> None:
    five["e"].latency = None
    said = Budget(None, 0.1).answer(list(five.values()))
    assert said is not None
    assert said.startswith("none fits within 0.1 ms; nearest: qconfig=b ")
