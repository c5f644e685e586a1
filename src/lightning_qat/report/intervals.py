"""95 % intervals of accuracies, from the size of the test set or from a few seeds."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from lightning_qat.deployment.evidence import Evidence

_Z = 1.96


def wilson(share: float, images: int) -> tuple[float, float]:
    """Return the interval of an accuracy (Wilson 1927). It stays in 0..1, even at 100 %.

    Args:
        share: the measured accuracy, 0..1.
        images: number of test images.
    """
    centre = (share + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    half = math.sqrt(share * (1 - share) / images + (_Z / (2 * images)) ** 2)
    half *= _Z / (1 + _Z**2 / images)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(right: Tensor, reference_right: Tensor) -> tuple[float, float]:
    """Return the interval of the accuracy difference of two networks on the same images.

    Only the images on which exactly one network is right count. So the interval is far narrower
    than the interval for two test sets (Bonett and Price 2012, adjusted Wald).

    Args:
        right: bool N, True for the images on which the network was right.
        reference_right: the same for the network that it is compared with.
    """
    images = len(right) + 2
    won = (int((right & ~reference_right).sum()) + 1) / images
    lost = (int((~right & reference_right).sum()) + 1) / images
    half = _Z * math.sqrt((won + lost - (won - lost) ** 2) / images)
    return max(-1.0, won - lost - half), min(1.0, won - lost + half)


def difference(evidence: Evidence) -> dict[str, Any]:
    """Return the INT8 - FP32 test accuracy and its paired interval; {} without INT8."""
    if "int8" not in evidence.logits:
        return {}
    int8, fp32 = (evidence.logits[x].argmax(1) == evidence.labels for x in ("int8", "fp32"))
    low, high = paired_difference(int8, fp32)
    value = float(int8.double().mean() - fp32.double().mean())
    return {"difference": {"int8_vs_fp32": {"value": value, "low": low, "high": high}}}


def unpaired_noise(first: float, second: float, images: int) -> float:
    """Return half the interval of the difference of two accuracies if only the shares are known.

    If both were measured on the same images, the result is too wide rather than too narrow.
    """
    return _Z * math.sqrt((first * (1 - first) + second * (1 - second)) / images)


def student(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the mean of two or more measurements (Student 1908)."""
    from scipy.stats import sem, t  # a slow import that few runs need

    centre = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1) * sem(values))
    return centre - half, centre + half
