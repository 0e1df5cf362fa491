"""Network for outlines in images: down to a small map and up again, with what was seen on the way."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared_models.nets.cnn import block


class UNet(nn.Module):
    """One level per entry of ``channels``, each at half the map of the one before; every pixel is classified.

    Maps are enlarged by copying, then cut to the size of the map they are joined with, so that any size of image fits.

    Args:
        image_channels: 1 or 3.
        channels: Channels of each level, the first at full resolution; at least two.

    Source:
        Ronneberger et al., arXiv:1505.04597, with padding, GroupNorm, and copying in place of transposed convolutions.
    """

    def __init__(self, image_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        befores = (image_channels, *channels)
        self.down = nn.ModuleList(_level(befores[i], after) for i, after in enumerate(channels))
        self.up = nn.ModuleList(
            _level(below + here, here) for here, below in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape ``(n, height * width)`` row by row, of images, shape ``(n, channels, height, width)``."""
        seen = []
        for depth, level in enumerate(self.down):
            images = level(self.pool(images) if depth else images)
            seen.append(images)
        for level, here in zip(self.up, seen[-2::-1], strict=True):
            large = functional.interpolate(images, scale_factor=2, mode="nearest")
            images = level(torch.cat([large[:, :, : here.shape[2], : here.shape[3]], here], dim=1))
        logits: Tensor = self.head(images).flatten(start_dim=1)
        return logits


def _level(before: int, after: int) -> nn.Module:
    return nn.Sequential(block(before, after, kernel=3, stride=1), block(after, after, kernel=3, stride=1))
