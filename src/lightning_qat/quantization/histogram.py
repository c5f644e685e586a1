"""Find ranges that cut off outliers with the least error, from a histogram."""

import torch
from torch import Tensor, nn

from lightning_qat.quantization.qconfig import QConfig

_BINS = 2048
_CANDIDATES = 128  # number of ranges that are tried


class Histogram(nn.Module):
    """A histogram of all values so far, and the range with the least squared rounding error.

    Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019.
    """

    counts: Tensor
    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(_BINS))
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    @torch.no_grad()
    def observe(self, x: Tensor, qconfig: QConfig) -> tuple[Tensor, Tensor]:
        """Add the values of ``x`` (any shape, float32); return the best low and high end."""
        low, high = torch.aminmax(x)
        low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        centers = _centers(self.low, self.high)
        self.counts.copy_(_counts(centers, self.counts, low, high))
        self.counts += _counts(x.flatten(), torch.ones_like(x.flatten()), low, high)
        self.low.copy_(low)
        self.high.copy_(high)
        return self._best_range(qconfig)

    def _best_range(self, qconfig: QConfig) -> tuple[Tensor, Tensor]:
        quant_min, quant_max = qconfig.activation_range
        centers = _centers(self.low, self.high)
        # Candidates move both ends towards 0 by the same share.
        share = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES, device=centers.device)[:, None]
        low, high = self.low * share, self.high * share
        if qconfig.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / (quant_max - quant_min)).clamp(min=1e-12)
        values = centers[None]
        rounded = ((values / scale).round() * scale).clamp(low, high)
        error = ((rounded - values) ** 2 * self.counts).sum(1)
        best = error.argmin()
        return low[best, 0], high[best, 0]


def _centers(low: Tensor, high: Tensor) -> Tensor:
    width = (high - low) / _BINS
    return low + width * (torch.arange(_BINS, device=low.device) + 0.5)


def _counts(values: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    width = ((high - low) / _BINS).clamp(min=1e-30)
    places = ((values - low) / width).long().clamp(0, _BINS - 1)
    return torch.zeros(_BINS, device=values.device).index_add_(0, places, weights)
