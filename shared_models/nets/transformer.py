"""Network for tokens or series: pre-norm Transformer encoder, mean over the positions that are there."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared_models import plan
from shared_models.nets.lstm import observe


class Tokens(nn.Module):
    """Token ids, shape ``(n, length)``, to vectors; id 0 is not there."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors, shape ``(n, length, width)``, and which positions are there, shape ``(n, length)``."""
        return self.embedding(tokens), tokens != 0


class Series(nn.Module):
    """Series, shape ``(n, steps, 3 * variables)``, to vectors; a step at which nothing was seen is not there."""

    def __init__(self, variables: int, width: int, *, carry_forward: bool = False) -> None:
        super().__init__()
        self.carry_forward = carry_forward
        self.projection = nn.Linear(3 * variables, width)

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors, shape ``(n, steps, width)``, and which steps are there, shape ``(n, steps)``."""
        observed, present = observe(series, carry_forward=self.carry_forward)
        return self.projection(observed), present


class Transformer(nn.Module):
    """Encoder over embedded positions; the mean over the positions that are there is classified.

    Guarantees:
        * Positions that are not there change nothing: they are neither attended to nor averaged.
        * A record without any position gets finite logits and finite gradients.

    Args:
        embedding: Inputs to vectors of the shape's width, and which positions are there.
        length: Number of positions.
        shape: Width of every layer, attention heads, number of layers.
        outputs: Number of logits.
    """

    def __init__(self, embedding: Tokens | Series, length: int, shape: plan.Transformer, outputs: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = nn.Embedding(length, shape.width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.layers = nn.ModuleList(_EncoderLayer(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape ``(n, outputs)``."""
        vectors, present = self.embedding(inputs)
        # Expanded over the batch: looked up once for all records, a position's gradient would belong to no record.
        vectors = vectors + self.positions(torch.arange(inputs.shape[1], device=inputs.device).expand(present.shape))
        # A softmax over nothing is NaN in some of torch's kernels, so a record without positions attends everywhere;
        # its mean below is zero all the same.
        attended = (present | ~present.any(dim=1, keepdim=True))[:, None, None, :]
        for layer in self.layers:
            vectors = layer(vectors, attended)
        logits: Tensor = self.head(mean_of(self.norm(vectors), present))
        return logits


class _EncoderLayer(nn.Module):
    """Attention, then two linear layers; each is added to its normalised input's original (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, vectors: Tensor, attended: Tensor) -> Tensor:
        vectors = vectors + self._attend(self.attention_norm(vectors), attended)
        result: Tensor = vectors + self.feedforward(self.feedforward_norm(vectors))
        return result

    def _attend(self, vectors: Tensor, attended: Tensor) -> Tensor:
        """Multi-head attention in plain linear layers: Opacus cannot see into ``torch.nn.MultiheadAttention``."""
        records, length, width = vectors.shape
        split = self.queries_keys_values(vectors).view(records, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=attended)
        result: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(records, length, width))
        return result


def mean_of(vectors: Tensor, present: Tensor) -> Tensor:
    """Mean over the positions that are there, shape ``(n, width)``; zero where there are none."""
    weights = present.to(vectors.dtype).unsqueeze(2)
    return (vectors * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
