"""Networks that start from a pretrained base: what is frozen, what is trained on top of it, and what is kept of it."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared_models import plan
from shared_models.errors import PretrainedError
from shared_models.nets.cnn import Cnn
from shared_models.nets.transformer import mean_of
from shared_models.pretrained import Body, Encoder
from shared_models.tasks import ImageInput

KEPT_BYTES = 2 << 30  # of a network's frozen part; what does not fit is computed again each time
_AT_ONCE = 32  # records in a pass through the frozen part


class Kept:
    """What a network's frozen part gave for each record, so that it is computed once. In memory, and nowhere else.

    It is a GPU's memory where that has four times as much to spare, else the processor's.

    Guarantees:
        * What is given back is what would be computed, up to the rounding of other batch sizes.
        * It goes with the process, and a copy of a network starts with nothing.

    Args:
        limit: Bytes to keep at most; 0 keeps nothing.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit = limit
        self.size = 0
        self._outputs: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        """Records whose output is kept."""
        return len(self._outputs)

    def __repr__(self) -> str:
        """Counts only: the keys and outputs are a patient's."""
        return f"Kept({len(self)} records)"

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Kept":
        """Empty: somebody may change the copy's weights."""
        return Kept(self.limit)

    def clear(self) -> None:
        """Forget every record."""
        self._outputs.clear()
        self.size = 0

    def of(self, inputs: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs of a batch, shape ``(n, ...)``, on the inputs' device.

        Args:
            inputs: Shape ``(n, ...)``; at least one record.
            compute: The frozen part: gives each record's output whatever else is in the batch.
        """
        with torch.no_grad():
            if not self.limit:
                return compute(inputs)
            keys = [hashlib.blake2b(row.tobytes(), digest_size=32).digest() for row in inputs.cpu().numpy()]
            found = {key: self._outputs[key] for key in keys if key in self._outputs}
            absent = {key: row for row, key in enumerate(keys) if key not in found}  # each record once
            rows = list(absent.values())
            where = self._where(inputs.device) if rows else inputs.device
            for some in (rows[first : first + _AT_ONCE] for first in range(0, len(rows), _AT_ONCE)):
                outputs = compute(inputs[some]).to(where)
                found |= {keys[row]: output.clone() for row, output in zip(some, outputs, strict=True)}
            for key in absent:
                self._keep(key, found[key])
            return torch.stack([found[key].to(inputs.device) for key in keys])

    def _where(self, device: torch.device) -> torch.device:
        roomy = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 4 * self.limit
        return device if roomy else torch.device("cpu")

    def _keep(self, key: bytes, output: Tensor) -> None:
        size = output.numel() * output.element_size()
        if self.size + size <= self.limit:
            self._outputs[key] = output
            self.size += size


def forget(model: nn.Module) -> None:
    """Forget what a network has kept of records, if it keeps anything."""
    for module in model.modules():
        if isinstance(kept := module.__dict__.get("kept"), Kept):
            kept.clear()


class PretrainedEncoder(nn.Module):
    """A frozen encoder with low-rank adapters in its top layers; the mean of its positions is classified.

    Layers below the lowest adapter depend on the record alone: their output is kept (``Kept``). The mean is scaled to
    length ``sqrt(width)``, so that no record's features are larger than another's. The head starts at zero.

    Guarantees:
        * Nothing but adapters and head is trainable, and the base's tensors are shared with every other network of it.
        * Positions that are not there (id 0) change nothing.
        * There is no dropout: training and evaluation compute the same.

    Source:
        Hu et al., arXiv:2106.09685: adapters at queries and values. The mean over positions: Reimers and Gurevych,
        arXiv:1908.10084.

    Args:
        base: The encoder.
        shape: Rank, alpha, how many layers have adapters, and how many tokens are read.
        outputs: Number of logits.

    Raises:
        PretrainedError: The plan wants more layers or tokens than the base has, or the base lacks weights.
    """

    def __init__(self, base: Encoder, shape: plan.PretrainedEncoder, outputs: int) -> None:
        super().__init__()
        layers, width = base.shape["num_hidden_layers"], base.shape["hidden_size"]
        for what, wanted, there in (
            ("layers with adapters", shape.top_layers, layers),
            ("tokens", shape.length, base.shape["max_position_embeddings"]),
        ):
            if wanted > there:
                raise PretrainedError(f"the plan wants {wanted} {what}, and the base has {there}", hint="Plan fewer.")
        self.words = _embedding(base, "word")
        self.positions = _embedding(base, "position")
        self.types = _embedding(base, "token_type")
        self.norm = nn.LayerNorm(width, eps=base.epsilon)
        _fill(self.norm, base.tensors, "embeddings.LayerNorm.")
        frozen = _encoder_layers(base)
        cut = layers - shape.top_layers
        self.below = frozen[:cut]
        self.above = _adapted(frozen[cut:], shape) if shape.top_layers else nn.ModuleList()
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.kept = Kept()

    def forward(self, tokens: Tensor, frozen: Tensor | None = None) -> Tensor:
        """Logits, shape ``(n, outputs)``, of token ids, shape ``(n, length)``.

        ``frozen`` is their ``frozen_part``, if at hand.
        """
        vectors = self.frozen_part(tokens) if frozen is None else frozen
        if len(self.above):
            vectors = _sentences(_through(self.above, vectors, tokens), tokens)
        logits: Tensor = self.head(vectors)
        return logits

    def frozen_part(self, tokens: Tensor) -> Tensor:
        """What no training changes: vectors at each position, or of the whole text where there is no adapter."""
        return self.kept.of(tokens, self._frozen)

    def _frozen(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        vectors = self.norm(self.words(tokens) + self.types(torch.zeros_like(tokens)) + self.positions(places))
        vectors = _through(self.below, vectors, tokens)
        return vectors if len(self.above) else _sentences(vectors, tokens)


class PretrainedCnn(Cnn):
    """A frozen body of convolutions that were trained before, and a linear head of its own that starts at zero.

    Guarantees:
        * Nothing but the head is trainable, and with ``train_norms`` the group normalisations' scales and shifts.
        * Where nothing of the body is trained, its output for a record is kept (``Kept``).

    Args:
        base: The body.
        shape: Whether normalisations are trained.
        image: The task's images.
        outputs: Number of logits.

    Raises:
        PretrainedError: The body is for other images.
    """

    def __init__(self, base: Body, shape: plan.PretrainedCnn, image: ImageInput, outputs: int) -> None:
        if image.channels != base.image_channels:
            raise PretrainedError(
                f"the base was trained on images of {base.image_channels} channels, the task's have {image.channels}",
                hint="Use a base that was trained on images like the task's.",
            )
        super().__init__(image.channels, max(image.height, image.width), base.channels, outputs)
        _fill(self.blocks, base.tensors, "blocks.")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if shape.train_norms:
            for module in self.blocks.modules():
                if isinstance(module, nn.GroupNorm):  # a copy: the base's tensors are everybody's
                    module.weight = nn.Parameter(module.weight.detach().clone())
                    module.bias = nn.Parameter(module.bias.detach().clone())
        self.kept = Kept(0 if shape.train_norms else KEPT_BYTES)
        self._moves = shape.train_norms

    def forward(self, images: Tensor, frozen: Tensor | None = None) -> Tensor:
        """Logits, shape ``(n, outputs)``, of images, shape ``(n, channels, height, width)``.

        ``frozen`` is their ``frozen_part``, if at hand.
        """
        if frozen is None:
            frozen = self.frozen_part(images)
        logits: Tensor = self.head(self._features(images) if frozen is None else frozen)
        return logits

    def frozen_part(self, images: Tensor) -> Tensor | None:
        """What no training changes: the features of each image; None where normalisations are trained."""
        return None if self._moves else self.kept.of(images, self._features)

    def _features(self, images: Tensor) -> Tensor:
        return self.blocks(images).mean(dim=(2, 3))


def _through(layers: nn.ModuleList, vectors: Tensor, tokens: Tensor) -> Tensor:
    present = tokens != 0
    # A softmax over nothing is NaN in some of torch's kernels; a record without tokens attends everywhere.
    attended = (present | ~present.any(dim=1, keepdim=True))[:, None, None, :]
    for layer in layers:
        vectors = layer(vectors, attention_mask=attended)
    return vectors


def _sentences(vectors: Tensor, tokens: Tensor) -> Tensor:
    return functional.normalize(mean_of(vectors, tokens != 0), dim=1) * math.sqrt(vectors.shape[2])


def _encoder_layers(base: Encoder) -> nn.ModuleList:
    """The base's layers as ``transformers`` computes them, frozen, without dropout."""
    from transformers.models.bert.configuration_bert import BertConfig  # noqa: PLC0415 - an extra; seconds to import
    from transformers.models.bert.modeling_bert import BertLayer  # noqa: PLC0415 - the same

    config = BertConfig(
        **base.shape, layer_norm_eps=base.epsilon, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):  # no memory, and no random numbers, for what is filled from the base
        layers = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(base.shape["num_hidden_layers"]))
    for number, layer in enumerate(layers):
        layer.get_submodule(
            "intermediate"
        ).intermediate_act_fn = nn.GELU()  # the same function; a type on the list of tested layers
        _fill(layer, base.tensors, f"encoder.layer.{number}.")
    return layers


def _adapted(layers: nn.ModuleList, shape: plan.PretrainedEncoder) -> nn.ModuleList:
    """The same layers with adapters by ``peft``, which begin as zero."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - an extra; only some plans need it

    config = LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, lora_dropout=0.0, bias="none", target_modules=["query", "value"]
    )
    adapted: nn.ModuleList = inject_adapter_in_model(config, layers)
    return adapted


def _embedding(base: Encoder, kind: str) -> nn.Embedding:
    weight = base.tensors.get(f"embeddings.{kind}_embeddings.weight")
    rows = base.shape[{"word": "vocab_size", "position": "max_position_embeddings"}.get(kind, "type_vocab_size")]
    if weight is None or weight.shape != (rows, base.shape["hidden_size"]):
        raise PretrainedError(f"the base lacks its {kind} embeddings", hint="It is damaged, or no BERT.")
    return nn.Embedding.from_pretrained(weight, freeze=True)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Use the base's tensors as a module's parameters, frozen."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(own, strict=True, assign=True)
    except RuntimeError:
        raise PretrainedError(
            f"the base's weights {prefix}* do not fit the network", hint="It is damaged, or of another kind or size."
        ) from None
    module.requires_grad_(requires_grad=False)
