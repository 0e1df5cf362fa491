"""Networks for rows of a table: logistic regression, proportional hazards, linear layers with ReLU between them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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


class ProportionalHazards(nn.Module):
    """One linear score for each record, and for each interval a hazard that all records share; the two add up.

    So a feature raises the odds of the event by one factor in every interval, as in Cox's model. It starts at zero, but
    for the shared hazards: one event in eight intervals.

    Args:
        width: Length of one encoded row.
        intervals: Number of intervals.

    Source:
        Cox, "Regression models and life-tables", JRSS B 1972, section 6 (time in intervals).
    """

    def __init__(self, width: int, intervals: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        self.hazards = nn.Embedding(intervals, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.hazards.weight, -2.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of the hazards, shape ``(n, intervals)``, of rows, shape ``(n, width)``."""
        intervals = torch.arange(self.hazards.num_embeddings, device=rows.device)
        # Expanded over the batch: looked up once for all records, a gradient would belong to no record.
        shared = self.hazards(intervals.expand(len(rows), -1)).squeeze(2)
        logits: Tensor = self.score(rows) + shared
        return logits


def mlp(width: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers ``width -> hidden[0] -> ... -> outputs``, ReLU after each but the last."""
    widths = (width, *hidden)
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
