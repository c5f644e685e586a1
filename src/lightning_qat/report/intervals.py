"""95 % intervals of what a test set of finite size can show."""

import math

from torch import Tensor

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


def unpaired_noise(first: float, second: float, images: int) -> float:
    """Half the interval of the difference of two accuracies, of which only the shares are known.

    On the same images it is too wide rather than too narrow.
    """
    return _Z * math.sqrt((first * (1 - first) + second * (1 - second)) / images)
