"""Network for images of 28 to 224 pixels: convolutions, GroupNorm, global average pooling, one linear layer."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

SMALL_IMAGE = 64  # pixels; a larger image enters through a strided stem
SMALLEST_MAP = 7  # pixels; a map this small is pooled no further, so any depth fits any image


class Cnn(nn.Module):
    """One block per entry of ``channels``, each halving the map; the average over the last map is classified.

    A large image enters through a 7x7 convolution of stride 4, which keeps the memory of per-record gradients in bounds
    and gives the last map a view of a good part of the image. A small one enters at full resolution.

    GroupNorm normalises within one record. BatchNorm would mix patients: clipping could no longer bound one patient's
    share, and running means would be an unpriced release.

    Args:
        image_channels: 1 or 3.
        size: The longer side of the image, in pixels.
        channels: Output channels of each block; at least one.
        outputs: Number of logits.
    """

    def __init__(self, image_channels: int, size: int, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        large = size > SMALL_IMAGE
        map_size = -(-size // 4) if large else size
        kernel, stride = (7, 4) if large else (3, 1)
        blocks = [block(image_channels, channels[0], kernel=kernel, stride=stride)]
        for before, after in pairwise(channels):
            if map_size > SMALLEST_MAP:
                blocks.append(nn.MaxPool2d(2, ceil_mode=True))
                map_size = -(-map_size // 2)
            blocks.append(block(before, after, kernel=3, stride=1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape ``(n, outputs)``, of images, shape ``(n, channels, height, width)``."""
        logits: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return logits


def block(before: int, after: int, *, kernel: int, stride: int) -> nn.Module:
    """A convolution, GroupNorm and ReLU; the map shrinks by the stride alone."""
    """A convolution, GroupNorm and ReLU; the map shrinks by the stride alone."""
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2),
        nn.GroupNorm(_groups(after), after),
        nn.ReLU(),
    )


def _groups(channels: int) -> int:
    """Up to 8 groups of at least two channels each, where the number of channels can be divided so."""
    return next(groups for groups in (8, 4, 2, 1) if groups == 1 or (channels % groups == 0 and channels >= 2 * groups))
