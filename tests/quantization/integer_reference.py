"""What an integer network computes, from the definition, in numpy: nothing here is torch's.

A number x is the integer q = clip(round(x / s) + z), half to even, and q stands for (q - z) * s. A
layer sums (q - z) * w in 32 bits, adds its bias as an integer of the same step, and requantises:
one multiplication by s_in * s_weight / s_out, one rounding, half to even.

Kernels do the last part in float32. Where the number to round is a tie up to that precision, either
neighbour is right; everywhere else there is one right integer. `assert_integers` says just that.
"""

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ULP = 2.0**-24  # the relative error of one float32 operation


def exact_steps(x: Array, scale: Array | float) -> Array:
    """What is rounded when float32 ``x`` becomes integers."""
    return x.astype(np.float64) / np.asarray(scale, np.float64)


def kernel_quantise(x: Array, scale: float, zero_point: int, highest: int = 255) -> Array:
    """As torch's kernels do it: by the float32 reciprocal of the scale, in float32."""
    steps = x.astype(np.float32) * (np.float32(1) / np.float32(scale))
    return np.clip(np.rint(steps).astype(np.float64) + zero_point, 0, highest).astype(np.int64)


def integer_convolution(
    q: Array, weight: Array, stride: Any, padding: Any, dilation: Any, groups: int
) -> Array:
    """Sums of products of N x C x H x W, zero point subtracted, and O x C / groups x h x w."""
    (height, width), outputs = weight.shape[2:], weight.shape[0]
    q = np.pad(q, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    rows = (q.shape[2] - dilation[0] * (height - 1) - 1) // stride[0] + 1
    columns = (q.shape[3] - dilation[1] * (width - 1) - 1) // stride[1] + 1
    grouped = q.reshape(len(q), groups, -1, *q.shape[2:])
    by_group = weight.reshape(groups, outputs // groups, -1, height, width)
    sums = np.zeros((len(q), groups, outputs // groups, rows, columns), np.int64)
    for y, x in itertools.product(range(height), range(width)):
        top, left = y * dilation[0], x * dilation[1]
        window = grouped[
            ...,
            top : top + rows * stride[0] : stride[0],
            left : left + columns * stride[1] : stride[1],
        ][..., :rows, :columns]
        sums += np.einsum("ngcyx,goc->ngoyx", window, by_group[..., y, x])
    assert np.abs(sums).max(initial=0) < 2**31, "the 32 bits of a sum overflow"
    return sums.reshape(len(q), outputs, rows, columns)


def assert_integers(
    found: Array, exact: Array, tolerance: Array | float, zero_point: int, limits: tuple[int, int]
) -> Array:
    """Check ``found`` against ``exact``, the numbers before rounding; give where it was a tie.

    Bit for bit, but for where ``exact`` is within ``tolerance`` of a tie: there one step.
    """
    expected = np.clip(np.rint(exact) + zero_point, *limits)
    tie: Array = np.abs(exact - np.floor(exact) - 0.5) <= tolerance
    wrong = np.abs(found - expected) > tie
    assert not wrong.any(), (found[wrong][:5], expected[wrong][:5], exact[wrong][:5])
    return tie


def saturating_pair_sums(activations: Array, weights: Array) -> Array:
    """The dot products of the last axis as AVX2 without VNNI has them.

    vpmaddubsw multiplies unsigned by signed bytes, and adds each two neighbours in 16 bits, which
    saturate; from there on sums have 32.
    """
    products = activations.astype(np.int64) * weights.astype(np.int64)
    pairs = products[..., ::2] + products[..., 1::2]
    total: Array = np.clip(pairs, -(2**15), 2**15 - 1).sum(-1)
    return total
