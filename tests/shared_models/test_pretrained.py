"""Pretrained bases: which files a digest means, what is refused, and networks that train little on top of them."""

import copy
import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
import torch
import transformers
from safetensors.numpy import load_file
from torch import Tensor, nn

from shared_models.errors import ConfigError, PretrainedError
from shared_models.model_file import read_about, read_model, write_model
from shared_models.nets.build import build_network, check_supported, count_parameters
from shared_models.nets.pretrained import Kept, forget
from shared_models.plan import StudyPlan, parse_plan
from shared_models.pretrained import (
    ENCODER_FILES,
    check_copy,
    digest_of,
    find_base,
    find_encoder,
    offer_bases,
)
from shared_models.tasks import TokensInput, find_task, task_of
from shared_models.update import parameters_to_vector, trainable, vector_to_parameters
from tests.tiny_bases import LAYERS, WIDTH, image_plan, rewrite, text_plan, write_body, write_encoder

TEXTS = ("Kidney stone with catheter.", "Cataracts, left eye: the lens 12 and the cornea.", "urine")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, known to this process."""
    folder = tmp_path_factory.mktemp("bases") / "encoder"
    offer_bases({write_encoder(folder): folder})
    return folder


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of a tiny CNN, known to this process."""
    path = tmp_path_factory.mktemp("bases") / "body.safetensors"
    offer_bases({write_body(path): path})
    return path


def built(plan: StudyPlan) -> Any:
    """A plan's network."""
    return build_network(plan.network, task_of(plan), seed=plan.seed)


def tokens(base: Path, length: int = 12) -> Tensor:
    """The texts in the base's own tokens."""
    found = find_encoder(digest_of(base))
    return torch.from_numpy(np.stack([found.encode(text, length=length) for text in TEXTS]))


def refusal(folder: Path, digest: str) -> str:
    """The words with which a copy is refused."""
    plan = text_plan(digest)
    with pytest.raises(PretrainedError) as caught:
        check_copy(plan.network, {digest: folder})
    return f"{caught.value} | {caught.value.hint}"


# which files a digest means


def test_a_digest_is_of_three_files_and_nothing_else(encoder: Path, tmp_path: Path) -> None:
    """SHA-256 over the canonical JSON of their SHA-256: computed here from the definition; names and dates are free."""
    files = {name: hashlib.sha256((encoder / name).read_bytes()).hexdigest() for name in ENCODER_FILES}
    defined = hashlib.sha256(rfc8785.dumps({"format": "konsil-base/1", "files": files})).hexdigest()
    moved = tmp_path / "by-another-name"
    shutil.copytree(encoder, moved)
    (moved / "README.md").write_text("what else lies here", encoding="utf-8")

    assert digest_of(encoder) == digest_of(moved) == defined


@pytest.mark.parametrize("name", ENCODER_FILES)
def test_any_byte_of_any_file_changes_the_digest_and_is_refused(encoder: Path, tmp_path: Path, name: str) -> None:
    """Weights, configuration and tokenizer alike; the refusal shows both digests, and says what to do."""
    wanted, other = digest_of(encoder), tmp_path / "other"
    shutil.copytree(encoder, other)
    content = bytearray((other / name).read_bytes())
    content[-2] ^= 1
    (other / name).write_bytes(content)

    words = refusal(other, wanted)

    assert f"its digest is {digest_of(other)}, not {wanted}" in words
    assert "Get the one that the plan's author used" in words


def test_a_base_that_nobody_has_is_named_with_what_to_do(encoder: Path) -> None:
    """Other copies that this process knows do not count for a party whose own settings name none."""
    plan = text_plan(digest_of(encoder))
    unknown = text_plan("0" * 64)

    with pytest.raises(PretrainedError, match="no copy of the pretrained base") as caught:
        check_copy(plan.network, {})

    assert "[pretrained] DIGEST = PATH" in caught.value.hint
    with pytest.raises(PretrainedError, match=r"0{64}"):
        task_of(unknown)
    with pytest.raises(PretrainedError, match=r"0{64}"):
        count_parameters(image_plan("0" * 64).network, find_task("pneumonia"))


def bomb(target: Path) -> bytes:
    """A pickle that makes a folder when it is opened, written out so that nothing here has to know pickles."""
    return f"cos\nmkdir\n(V{target}\ntR.".encode()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickled_weights_are_refused_and_never_opened(encoder: Path, tmp_path: Path, suffix: str) -> None:
    """In a folder in place of safetensors, or as the file itself: what they would run is not run."""
    digest, other, target = digest_of(encoder), tmp_path / "other", tmp_path / "exploded"
    shutil.copytree(encoder, other)
    (other / "model.safetensors").unlink()
    pickled = other / f"pytorch_model{suffix}"
    pickled.write_bytes(bomb(target))

    for place in (other, pickled):
        assert "pickled weights" in refusal(place, digest)
        assert "safetensors" in refusal(place, digest)

    assert not target.exists()


def test_pickled_weights_beside_safetensors_change_nothing(encoder: Path, tmp_path: Path) -> None:
    """Publishers give out both; the pickle is not part of the base, and is not looked at."""
    other, target = tmp_path / "other", tmp_path / "exploded"
    shutil.copytree(encoder, other)
    (other / "pytorch_model.bin").write_bytes(bomb(target))

    check_copy(text_plan(digest_of(encoder)).network, {digest_of(encoder): other})

    assert not target.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "wants to run code of its own"),
        ({"model_type": "roberta"}, "model_type = 'roberta' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"pad_token_id": 1}, "pad_token_id = 1 is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"hidden_size": -3}, "has hidden_size = -3"),
        ({"vocab_size": 3}, "more tokens than the encoder"),
    ],
)
def test_a_base_that_is_no_plain_bert_is_refused(
    encoder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """By its configuration, whatever its digest: other code, another architecture, another meaning of a token."""
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8")) | changes
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")

    assert words in refusal(other, digest_of(other))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"no tensors", "is damaged"),
        ("config.json", b"{", "cannot be used (JSONDecodeError)"),
        ("tokenizer.json", b"{}", "cannot be used"),
        ("tokenizer.json", None, "does not exist"),
        ("model.safetensors", None, "does not exist"),
    ],
)
def test_a_damaged_base_is_refused_by_name(
    encoder: Path, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    """Also where its digest is the plan's: the plan's author had a damaged one."""
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    if content is None:
        (other / name).unlink()
        digest = "1" * 64
    else:
        (other / name).write_bytes(content)
        digest = digest_of(other)

    assert words in refusal(other, digest)
    assert str(other) in refusal(other, digest)


def test_no_connection_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest, tokens, network and an output, with every socket refused."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    digest = write_encoder(tmp_path, seed=7)
    offer_bases({digest: tmp_path})

    model = built(text_plan(digest))

    assert model(tokens(tmp_path)).shape == (3, 8)


# what a network computes, and what of it is trained


def test_the_encoder_computes_what_transformers_computes(encoder: Path) -> None:
    """Mean over positions of the last layer, by AutoModel with its own mask, scaled to length sqrt(width)."""
    model, ids = built(text_plan(digest_of(encoder))), tokens(encoder)
    reference = transformers.AutoModel.from_pretrained(encoder, local_files_only=True).eval()
    mask = (ids != 0).long()

    with torch.no_grad():
        last = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (last * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        wanted = WIDTH**0.5 * mean / mean.norm(dim=1, keepdim=True)
        model.head = nn.Identity()
        found = model(ids)

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_only_adapters_and_head_are_trained_and_travel(encoder: Path) -> None:
    """The vector's length follows from rank, layers, width and classes: nothing of the base is in it."""
    for layers in range(LAYERS + 1):
        plan = text_plan(digest_of(encoder), top_layers=layers, rank=3)
        model = built(plan)

        names = set(trainable(model))
        adapters = layers * 2 * (3 * WIDTH + WIDTH * 3)  # queries and values, down and up
        head = WIDTH * 8 + 8

        assert all("lora_" in name or name.startswith("head.") for name in names)
        assert len(parameters_to_vector(model)) == adapters + head
        assert count_parameters(plan.network, task_of(plan)) == adapters + head


def test_writing_a_vector_leaves_the_base_alone(encoder: Path) -> None:
    """Two networks of one base share its tensors, and no vector reaches them."""
    plan = text_plan(digest_of(encoder))
    one, two = built(plan), built(plan)
    before = {name: tensor.clone() for name, tensor in find_encoder(digest_of(encoder)).tensors.items()}

    vector_to_parameters(np.ones(len(parameters_to_vector(one)), dtype=np.float32), one)

    assert one.words.weight.data_ptr() == two.words.weight.data_ptr()
    assert (parameters_to_vector(two) != 1).any()
    for name, tensor in find_encoder(digest_of(encoder)).tensors.items():
        assert torch.equal(tensor, before[name])


def test_adapters_begin_as_nothing_and_the_same_everywhere(encoder: Path) -> None:
    """At first a network with adapters computes what one without does; equal seeds draw equal adapters."""
    plain, adapted = (built(text_plan(digest_of(encoder), top_layers=layers)) for layers in (0, 2))
    again = built(text_plan(digest_of(encoder), top_layers=2))
    for model in (plain, adapted):
        nn.init.eye_(model.head.weight)

    with torch.no_grad():
        torch.testing.assert_close(plain(tokens(encoder)), adapted(tokens(encoder)), rtol=0, atol=1e-6)

    nn.init.zeros_(adapted.head.weight)
    np.testing.assert_array_equal(parameters_to_vector(adapted), parameters_to_vector(again))
    assert np.count_nonzero(parameters_to_vector(again)) == 2 * 2 * 2 * WIDTH


def test_positions_that_are_not_there_change_nothing(encoder: Path) -> None:
    """A text gets the same logits in twelve positions as in twenty."""
    short, long = (built(text_plan(digest_of(encoder), length=length)) for length in (16, 24))
    for model in (short, long):
        nn.init.eye_(model.head.weight)

    with torch.no_grad():
        logits = short(tokens(encoder, 16))
        torch.testing.assert_close(logits, long(tokens(encoder, 24)), rtol=0, atol=1e-5)

    assert (logits[0] - logits[2]).abs().max() > 0.1


def test_a_plan_that_wants_more_than_the_base_has_is_refused(encoder: Path) -> None:
    """More layers with adapters than there are, or more positions."""
    for changes, words in (({"top_layers": LAYERS + 1}, "4 layers"), ({"length": 41}, "41 tokens")):
        with pytest.raises(PretrainedError, match=words):
            built(text_plan(digest_of(encoder), **changes))


def test_a_base_of_the_wrong_kind_is_refused(encoder: Path, body: Path) -> None:
    """A CNN reads no texts, an encoder no images; and an encoder's tokens are its own, not the hashed ones."""
    with pytest.raises(PretrainedError, match="no text encoder"):
        built(text_plan(digest_of(body)))
    with pytest.raises(PretrainedError, match="no CNN"):
        built(image_plan(digest_of(encoder)))
    with pytest.raises(ConfigError, match="cannot be built"):
        build_network(text_plan(digest_of(encoder)).network, find_task("note-specialty"), seed=0)


def test_a_base_without_some_weight_is_refused(encoder: Path, tmp_path: Path) -> None:
    """Named, where a network is built from it."""
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    tensors = {name: torch.from_numpy(array) for name, array in load_file(encoder / "model.safetensors").items()}
    del tensors["encoder.layer.1.output.dense.bias"]
    rewrite(other / "model.safetensors", **tensors)
    offer_bases({digest_of(other): other})

    with pytest.raises(PretrainedError, match=r"encoder\.layer\.1\."):
        built(text_plan(digest_of(other)))


def test_a_task_on_texts_takes_the_tokens_of_the_base(encoder: Path, body: Path) -> None:
    """Same label and classes; with any other network the task stays what it is."""
    digest = digest_of(encoder)

    adapted, plain = task_of(text_plan(digest)), find_task("note-specialty")

    assert adapted.input == TokensInput(vocabulary=26, length=12, base=digest)
    assert adapted.model_copy(update={"input": plain.input}) == plain
    assert task_of(image_plan(digest_of(body))) == find_task("pneumonia")


def test_digits_are_blurred_before_the_tokenizer_sees_them(encoder: Path) -> None:
    """Dates and numbers of records look alike, as with hashed words."""
    found = find_encoder(digest_of(encoder))

    one, other = (found.encode(f"kidney 12-3{n}-1{n}", length=16) for n in (4, 7))

    assert one.tolist() == other.tolist()
    pieces = [found.tokenizer.id_to_token(number) for number in one if number]
    assert pieces == ["[CLS]", "kidney", "0", "##0", "-", "0", "##0", "-", "0", "##0", "[SEP]"]


# images


def test_a_frozen_body_gives_what_its_model_gave(body: Path) -> None:
    """With the old head in place of the new one; without training of normalisations only the head is trainable."""
    _, old = read_model(body)
    model = built(image_plan(digest_of(body)))
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    assert set(trainable(model)) == {"head.weight", "head.bias"}
    assert not any(p.any() for p in trainable(model).values())
    model.head = old.head
    torch.testing.assert_close(model(images), old(images))


def test_normalisations_of_a_body_can_be_trained_without_touching_the_base(body: Path) -> None:
    """Their scales and shifts travel with the head, and every network has its own."""
    plan = image_plan(digest_of(body), train_norms=True)
    one, two = built(plan), built(plan)

    vector_to_parameters(np.zeros(len(parameters_to_vector(one)), dtype=np.float32), one)

    assert len(parameters_to_vector(one)) == 2 * (4 + 8) + 8 + 1
    assert parameters_to_vector(two).any()
    assert all(t.any() for name, t in find_base(digest_of(body)).tensors.items() if name.endswith(".1.weight"))


def test_a_body_for_other_images_is_refused(body: Path) -> None:
    """Grey images were learnt from; colours are something else."""
    plan = image_plan(digest_of(body))
    colours = find_task("pneumonia").model_copy(
        update={"input": find_task("pneumonia").input.model_copy(update={"channels": 3})}
    )

    with pytest.raises(PretrainedError, match="images of 1 channels, the task's have 3"):
        build_network(plan.network, colours, seed=0)


# what is kept


@pytest.mark.parametrize("kind", ["encoder", "encoder without adapters", "cnn"])
def test_what_is_frozen_is_computed_once_for_each_record(
    encoder: Path, body: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Records that come again, alone or among others, cost nothing below; results are those without keeping."""
    plan = image_plan(digest_of(body)) if kind == "cnn" else text_plan(digest_of(encoder))
    if kind == "encoder without adapters":
        plan = text_plan(digest_of(encoder), top_layers=0)
    model, bare = built(plan), built(plan)
    bare.kept = Kept(limit=0)
    for each in (model, bare):
        with torch.no_grad():
            for parameter in trainable(each).values():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    part, seen = "_features" if kind == "cnn" else "_frozen", list[int]()
    below = getattr(model, part)

    def counted(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return below(inputs)

    monkeypatch.setattr(model, part, counted)
    inputs = torch.rand(3, 1, 28, 28) if kind == "cnn" else tokens(encoder)

    for rows in ([0, 1], [1, 2, 1], [2], [0, 1, 2]):
        with torch.no_grad():
            torch.testing.assert_close(model(inputs[rows]), bare(inputs[rows]), rtol=1e-5, atol=1e-5)

    assert seen == [2, 1]
    assert (len(model.kept), len(bare.kept)) == (3, 0)


def test_no_more_is_kept_than_the_limit(encoder: Path) -> None:
    """What does not fit is computed again; a copy of a network begins with nothing, for its weights may differ."""
    model = built(text_plan(digest_of(encoder)))
    each = 12 * WIDTH * 4
    model.kept = Kept(limit=2 * each)

    logits = model(tokens(encoder))

    assert (len(model.kept), model.kept.size) == (2, 2 * each)
    torch.testing.assert_close(model(tokens(encoder)), logits)
    assert len(copy.deepcopy(model).kept) == 0
    assert repr(model.kept) == "Kept(2 records)"
    forget(nn.Sequential(nn.Identity(), model))
    assert (len(model.kept), model.kept.size) == (0, 0)


# files


@pytest.mark.parametrize("kind", ["encoder", "cnn"])
def test_a_model_file_holds_what_was_trained_and_names_the_base(
    encoder: Path, body: Path, tmp_path: Path, kind: str
) -> None:
    """Read again where the base is, it is the same network; where it is not, the error says which is missing."""
    base = encoder if kind == "encoder" else body
    plan = text_plan(digest_of(base)) if kind == "encoder" else image_plan(digest_of(base))
    model = built(plan)
    vector = np.random.default_rng(0).normal(size=len(parameters_to_vector(model))).astype(np.float32)
    vector_to_parameters(vector, model)

    write_model(tmp_path / "model.safetensors", model, plan)

    _, again = read_model(tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == set(trainable(model))
    assert read_about(tmp_path / "model.safetensors")["base"] == digest_of(base)
    assert parameters_to_vector(again).tobytes() == vector.tobytes()
    foreign = plan.model_copy(update={"network": plan.network.model_copy(update={"base": "2" * 64})})
    write_model(tmp_path / "foreign.safetensors", model, foreign)
    with pytest.raises(PretrainedError, match=r"2{64}"):
        read_model(tmp_path / "foreign.safetensors")


# layers


def test_dropout_is_supported_only_where_it_is_off(encoder: Path) -> None:
    """It would draw from torch's global generator, and training would not be what the self-check saw."""
    model = built(text_plan(digest_of(encoder)))
    check_supported(model)

    model.above[0].output.dropout.p = 0.1

    with pytest.raises(ConfigError, match="Dropout"):
        check_supported(model)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pretrained-encoder", {"base": "not a digest"}),
        ("pretrained-encoder", {"base": "a" * 64, "rank": 0}),
        ("pretrained-encoder", {"base": "a" * 64, "alpha": float("nan")}),
        ("pretrained-encoder", {"base": "a" * 64, "path": "/models"}),
        ("pretrained-encoder", {}),
        ("pretrained-cnn", {"base": "A" * 64}),
    ],
)
def test_a_plan_names_a_base_by_digest_and_cannot_say_where_it_lies(name: str, changes: dict[str, Any]) -> None:
    """A path, a hub's name or a missing digest in a plan is an error."""
    fields = text_plan("a" * 64).model_dump(mode="json") | {"network": {"name": name} | changes}

    with pytest.raises(ConfigError, match="network"):
        parse_plan(fields)


def test_a_plan_with_defaults_says_what_it_must_and_no_more() -> None:
    """The canonical form leaves defaults out, so that later keys do not change old digests."""
    network = text_plan("a" * 64, length=256, rank=4, alpha=8.0, top_layers=2).network.model_dump(mode="json")

    assert network == {"name": "pretrained-encoder", "base": "a" * 64}
