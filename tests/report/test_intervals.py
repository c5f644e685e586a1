"""The intervals of the report, against scipy and against a calculation by hand."""

import pytest
import torch
from scipy.stats import binomtest

from lightning_qat.report.intervals import (
    difference,
    paired_difference,
    unpaired_noise,
    wilson,
)
from tests.report.run_folder import make_evidence


@pytest.mark.parametrize(("right", "images"), [(350, 360), (360, 360), (0, 50), (8268, 10000)])
def test_wilson_is_scipys(right: int, images: int) -> None:
    theirs = binomtest(right, images).proportion_ci(method="wilson")
    assert wilson(right / images, images) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


def test_paired_difference_counts_only_where_one_is_wrong() -> None:
    right, reference = torch.ones(98, dtype=torch.bool), torch.ones(98, dtype=torch.bool)
    reference[:9] = False  # won: 9, lost: 1, each plus 1 of 100
    right[9] = False
    # 0.10 - 0.02 +- 1.96 sqrt((0.12 - 0.08 ** 2) / 100)
    assert paired_difference(right, reference) == pytest.approx((0.01394, 0.14606), abs=1e-5)


def test_metrics_get_the_paired_difference_of_int8_to_fp32() -> None:
    evidence = make_evidence("qat", [str(digit) for digit in range(10)])
    (found,) = difference(evidence)["difference"].values()
    right = {name: x.argmax(1) == evidence.labels for name, x in evidence.logits.items()}
    ends = paired_difference(right["int8"], right["fp32"])
    assert (found["low"], found["high"]) == ends
    won = int(right["int8"].sum()) - int(right["fp32"].sum())
    assert found["value"] == pytest.approx(won / len(evidence.labels))
    assert difference(make_evidence("fp32", ["a", "b"])) == {}


def test_unpaired_noise_of_two_coins() -> None:
    # 1.96 sqrt(2 * 0.25 / 50)
    assert unpaired_noise(0.5, 0.5, 50) == pytest.approx(0.196)
