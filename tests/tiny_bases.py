"""Pretrained bases that nobody trained: random weights in the files that a publisher would give out."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from server.examples import PLANS
from shared_models.model_file import write_model
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan, read_plan
from shared_models.pretrained import digest_of
from shared_models.tasks import find_task
from tests.federation import changed

WIDTH, LAYERS, HEADS, INNER, POSITIONS = 16, 3, 2, 24, 40
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = "kidney stone bladder urine prostate catheter eye cataract lens retina vision cornea the with left right"
PIECES = (*WORDS.split(), "0", "##0", "##s", ".", ",", "-")


def write_encoder(folder: Path, *, seed: int = 0) -> str:
    """Write a tiny BERT as ``save_pretrained`` does, with a WordPiece tokenizer. Returns its digest."""
    vocabulary = {piece: number for number, piece in enumerate((*SPECIAL, *PIECES))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        with torch.no_grad():
            for parameter in model.parameters():  # its own spread is so small that texts would hardly differ
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return digest_of(folder)


def write_body(path: Path, *, seed: int = 0) -> str:
    """Write a model file of an untrained CNN for the task ``pneumonia``. Returns its digest."""
    plan = changed(
        read_plan(PLANS / "breast-cancer.toml"),
        task="pneumonia",
        seed=seed,
        network={"name": "cnn", "channels": [4, 8]},
    )
    model = build_network(plan.network, find_task(plan.task), seed=seed)
    write_model(path, model, plan)
    return digest_of(path)


def text_plan(base: str, **network: object) -> StudyPlan:
    """A plan on notes whose network starts from a tiny encoder."""
    plan = read_plan(PLANS / "breast-cancer.toml").model_dump(mode="json")
    fields = {"name": "pretrained-encoder", "base": base, "length": 12, "rank": 2, "alpha": 4.0} | network
    return StudyPlan.model_validate_json(json.dumps(plan | {"task": "note-specialty", "network": fields}))


def image_plan(base: str, **network: object) -> StudyPlan:
    """A plan on images whose network starts from a tiny body."""
    plan = read_plan(PLANS / "breast-cancer.toml").model_dump(mode="json")
    fields = {"name": "pretrained-cnn", "base": base} | network
    return StudyPlan.model_validate_json(json.dumps(plan | {"task": "pneumonia", "network": fields}))


def rewrite(path: Path, **tensors: torch.Tensor) -> None:
    """Write a safetensors file anew with these tensors."""
    save_file(tensors, path)
