"""Random crop and flip of whole uint8 batches, decided by (seed, epoch) alone."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

PaddingMode = Literal["reflect", "constant"]


def derived_seed(*keys: int) -> int:
    """Make a 32-bit seed that differs between neighbouring keys, e.g. (0, 1) and (1, 0)."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


class Augmentation:
    """Crops and flips the images of one data set.

    The draws of an epoch are made for all images at once, on the CPU: an image's crop depends
    neither on the batch it comes in, nor on the device, nor on what ran before.

    Args:
        count: number of images in the data set.
        size: height and width of an image, in pixels.
        padding: pixels added on each side before a crop of `size` is taken; 0 = no crop.
        padding_mode: what is added: `reflect` (like numpy's) or `constant` (zeros).
        flip: mirror every other image left-right.
        seed: any non-negative integer.
    """

    def __init__(
        self,
        *,
        count: int,
        size: int,
        padding: int,
        padding_mode: PaddingMode,
        flip: bool,
        seed: int,
    ) -> None:
        self.count, self.size, self.padding, self.seed = count, size, padding, seed
        self.zero_pad = padding if padding_mode == "constant" else 0
        self.max_flip = int(flip)
        # pixel coordinate after padding -> pixel coordinate in what the gather reads from
        coordinates = np.arange(size + 2 * self.zero_pad)
        if padding_mode == "reflect":
            coordinates = np.pad(coordinates, padding, mode="reflect")
        self._coordinates = torch.from_numpy(coordinates)
        self._draws: tuple[int, Tensor] | None = None

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Augment a batch; with neither crop nor flip, the batch itself is returned.

        Args:
            images: uint8, N x size x size x C, on any device.
            indices: int64, N, on the same device: each image's place in the data set.
            epoch: the current epoch, counted from 0.

        Returns:
            uint8, N x size x size x C, on the same device.
        """
        if not (self.padding or self.max_flip):
            return images
        top, left, mirrored = self._drawn(epoch, images.device)[indices].unsqueeze(-1).unbind(1)
        steps = torch.arange(self.size, device=images.device)
        rows = self._coordinates[top + steps]
        columns = self._coordinates[left + torch.where(mirrored > 0, self.size - 1 - steps, steps)]

        if self.zero_pad:
            images = pad(images, (0, 0) + 4 * (self.zero_pad,))
        n, height, width, channels = images.shape
        image_starts = torch.arange(0, n * height, height, device=images.device)[:, None]
        pixels = ((image_starts + rows) * width)[:, :, None] + columns[:, None, :]
        # one flat gather of whole pixels: over twice as fast as indexing with three tensors
        gathered = images.reshape(-1, channels).index_select(0, pixels.flatten())
        return gathered.view(n, self.size, self.size, channels)

    def _drawn(self, epoch: int, device: torch.device) -> Tensor:
        """Top, left and mirrored (0 or 1) of every image: int64, count x 3, cached per epoch."""
        if self._draws is None or self._draws[0] != epoch or self._draws[1].device != device:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            highest = 2 * self.padding, 2 * self.padding, self.max_flip
            columns = [torch.randint(h + 1, (self.count,), generator=generator) for h in highest]
            self._draws = epoch, torch.stack(columns, dim=1).to(device)
            self._coordinates = self._coordinates.to(device)
        return self._draws[1]
