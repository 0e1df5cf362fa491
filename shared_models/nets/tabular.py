"""Networks for rows of a table: logistic regression, and linear layers with ReLU between them."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def logistic_regression(width: int, outputs: int) -> nn.Sequential:
    """One linear layer that starts at zero: the problem is convex, so a random start would only add variance.

    Args:
        width: Length of one encoded row.
        outputs: Number of logits.
    """
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


def mlp(width: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers ``width -> hidden[0] -> ... -> outputs``, ReLU after each but the last."""
    widths = (width, *hidden)
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
