"""95 % intervals of what a test set of finite size, or a few seeds, can show."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from lightning_qat.deployment.evidence import Evidence

_Z = 1.96


def wilson(share: float, images: int) -> tuple[float, float]:
    """Interval of an accuracy (Wilson 1927): within 0..1, also where nothing was wrong.

    Args:
        share: the accuracy measured, 0..1.
        images: how many it was measured on.
    """
    centre = (share + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    half = math.sqrt(share * (1 - share) / images + (_Z / (2 * images)) ** 2)
    half *= _Z / (1 + _Z**2 / images)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(right: Tensor, reference_right: Tensor) -> tuple[float, float]:
    """Interval of the accuracy difference of two networks on the same images.

    Only the images on which one is right and the other wrong count, so it is far narrower than
    that of two test sets (Bonett and Price 2012, adjusted Wald).

    Args:
        right: bool N, whether the network was right.
        reference_right: bool N, whether the one it is compared with was.
    """
    images = len(right) + 2
    won = (int((right & ~reference_right).sum()) + 1) / images
    lost = (int((~right & reference_right).sum()) + 1) / images
    half = _Z * math.sqrt((won + lost - (won - lost) ** 2) / images)
    return max(-1.0, won - lost - half), min(1.0, won - lost + half)


def difference(evidence: Evidence) -> dict[str, Any]:
    """INT8 - FP32 test accuracy and its paired interval, for metrics.json; {} without INT8."""
    if "int8" not in evidence.logits:
        return {}
    int8, fp32 = (evidence.logits[x].argmax(1) == evidence.labels for x in ("int8", "fp32"))
    low, high = paired_difference(int8, fp32)
    value = float(int8.double().mean() - fp32.double().mean())
    return {"difference": {"int8_vs_fp32": {"value": value, "low": low, "high": high}}}


def unpaired_noise(first: float, second: float, images: int) -> float:
    """Half the interval of the difference of two accuracies, of which only the shares are known.

    On the same images it is too wide rather than too narrow.
    """
    return _Z * math.sqrt((first * (1 - first) + second * (1 - second)) / images)


def student(values: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean of a few measurements (Student 1908), two or more."""
    from scipy.stats import sem, t  # takes a while to import, and few runs need it

    centre = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1) * sem(values))
    return centre - half, centre + half
