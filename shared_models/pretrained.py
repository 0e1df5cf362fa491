"""Pretrained bases: what a plan names by digest, and where this machine's own copy of it lies.

A base never travels. Every party has its own copy, as files that hold numbers and texts only, and the plan's digest
says which. Nothing here, nor in the libraries as they are called from here, opens a connection or runs code of a base.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rfc8785
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shared_models.errors import PretrainedError
from shared_models.plan import Cnn, Network, PretrainedCnn, PretrainedEncoder, parse_plan_json
from shared_models.tokens import blurred

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = "konsil-base/1"
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MODEL_FILE = "model.safetensors"  # what a model of this project counts as, whatever its file is called
_PICKLED = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_SHAPE = (*_COUNTS, "max_position_embeddings", "type_vocab_size")
_FIXED: dict[str, Any] = {  # keys of a configuration, and the only value that the network here computes
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pad_token_id": 0,
}


class Origin(NamedTuple):
    """What a base is, and what its publisher lets others do with it, as far as that is known.

    Attributes:
        name: What it is called.
        licence: Of its weights; of a model of this project, of the data that it was trained on.
    """

    name: str
    licence: str


KNOWN: Mapping[str, Origin] = MappingProxyType(
    {
        "b834746d23414c4c0c38aec36c57c492ab8e962bc5d6fe75150462443063548c": Origin("all-MiniLM-L6-v2", "Apache-2.0"),
    }
)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A pretrained text encoder of BERT's kind.

    Attributes:
        digest: Of its files; see ``digest_of``.
        shape: Of its configuration what the network depends on, by the configuration's own names.
        epsilon: Of its layer normalisations.
        tensors: Its weights in float32, by name. Networks share them: nobody may change one.
        tokenizer: Of its own texts to its own token ids.
    """

    digest: str
    shape: Mapping[str, int]
    epsilon: float
    tensors: Mapping[str, Tensor]
    tokenizer: "Tokenizer"

    def encode(self, text: str, *, length: int) -> NDArray[np.int64]:
        """Token ids of a text, shape ``(length,)``, cut to fit, padded with 0 at the end.

        Digits become zeros before the tokenizer sees them, as ``tokens.words`` has it, and for its reason.
        """
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length=length)
        ids = self.tokenizer.encode(blurred(text)).ids
        return np.array(ids + [0] * (length - len(ids)), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Body:
    """The convolutions of a CNN that this project trained before.

    Attributes:
        digest: Of its model file.
        origin: The study that it comes from, and the licence of that study's data.
        channels: Of each block.
        image_channels: Of the images that it was trained on.
        tensors: Weights of all blocks in float32, by name. Networks share them: nobody may change one.
    """

    digest: str
    origin: Origin
    channels: tuple[int, ...]
    image_channels: int
    tensors: Mapping[str, Tensor]


Base = Encoder | Body

_offered: dict[str, Path] = {}
_loaded: dict[str, Base] = {}
_checked: set[tuple[str, Path]] = set()


def digest_of(path: Path) -> str:
    """What a plan calls a base: SHA-256 of ``{"files": {name: SHA-256}, "format": "konsil-base/1"}``, in hexadecimal.

    The inner digests are of the files' bytes; the outer one is of the object in canonical JSON (RFC 8785). A folder is
    an encoder, and its files are ``config.json``, ``model.safetensors`` and ``tokenizer.json``. A file is a model of
    this project, and counts as ``model.safetensors``. What else lies beside them is not looked at, and not used.

    Guarantees:
        * Equal digests mean equal weights, configuration and tokenizer (collision resistance of SHA-256).
        * It depends on no name of a folder, no date, and no file that is not used.

    Raises:
        PretrainedError: A file is missing or cannot be read, or there are only pickled weights.
    """
    return _digest(_contents(path))


def offer_bases(copies: Mapping[str, Path]) -> None:
    """Tell this process where copies lie, by digest. They are read when somebody asks for one, and checked then."""
    _offered.update(copies)


def offer_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Tell this process of copies whose digests nobody has written down; returns them by digest.

    Raises:
        PretrainedError: As for ``digest_of``.
    """
    copies = {digest_of(path): path.absolute() for path in paths}
    offer_bases(copies)
    return copies


def origin_of(digest: str) -> Origin | None:
    """What is known of a base: by its digest, or, of a model of this project, by its own file; None where nothing is.

    Raises:
        PretrainedError: As for ``find_base``.
    """
    base = find_base(digest)
    return base.origin if isinstance(base, Body) else KNOWN.get(digest)


def check_copy(network: Network, copies: Mapping[str, Path]) -> None:
    """Check that one party's own settings know a copy of the base that a plan's network names, and that it is the one.

    In a process of several parties each must have its copy, whatever another one has.

    Raises:
        PretrainedError: As for ``find_base``.
    """
    digest = base_of(network)
    if digest is not None:
        _load(digest, copies.get(digest))


def base_of(network: Network) -> str | None:
    """Digest of the base that a plan's network starts from, if it starts from one."""
    return network.base if isinstance(network, PretrainedEncoder | PretrainedCnn) else None


def find_base(digest: str) -> Base:
    """The base of that digest, from this process's copy of it; read once.

    Guarantees:
        * What is returned was made of the very bytes that the digest was computed from.

    Raises:
        PretrainedError: No copy is known here, it cannot be read, it is another one, or no network here can use it.
    """
    return _loaded[digest] if digest in _loaded else _load(digest, _offered.get(digest))


def find_encoder(digest: str) -> Encoder:
    """A base that is a text encoder.

    Raises:
        PretrainedError: As for ``find_base``, or it is something else.
    """
    base = find_base(digest)
    if not isinstance(base, Encoder):
        raise PretrainedError(f"base {digest[:12]} is no text encoder", hint="Name the base that the network is for.")
    return base


def find_body(digest: str) -> Body:
    """A base that is the body of a CNN.

    Raises:
        PretrainedError: As for ``find_base``, or it is something else.
    """
    base = find_base(digest)
    if not isinstance(base, Body):
        raise PretrainedError(f"base {digest[:12]} is no CNN", hint="Name the base that the network is for.")
    return base


def _load(digest: str, path: Path | None) -> Base:
    """Read, hash and parse the same bytes."""
    if path is None:
        raise PretrainedError(
            f"no copy of the pretrained base {digest} is known here",
            hint="Get it from its publisher, and name its folder in the settings: [pretrained] DIGEST = PATH.",
        )
    if (digest, path) not in _checked:
        contents = _contents(path)
        if (found := _digest(contents)) != digest:
            raise PretrainedError(
                f"{path} is not the base that the plan names: its digest is {found}, not {digest}",
                hint="It is another version, or was changed. Get the one that the plan's author used.",
            )
        _loaded.setdefault(digest, _parse(digest, path, contents))
        _checked.add((digest, path))
    return _loaded[digest]


def _digest(contents: Mapping[str, bytes]) -> str:
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return hashlib.sha256(rfc8785.dumps({"format": FORMAT, "files": files})).hexdigest()


def _contents(path: Path) -> dict[str, bytes]:
    """The bytes of every file that a base is made of, by the name that the digest has for it."""
    files = {name: path / name for name in ENCODER_FILES} if path.is_dir() else {MODEL_FILE: path}
    if path.suffix in _PICKLED:
        raise _pickled(path)
    try:
        return {name: file.read_bytes() for name, file in files.items()}
    except FileNotFoundError as error:
        pickled = path.is_dir() and any(file.suffix in _PICKLED for file in path.iterdir())
        if pickled and Path(error.filename).name == MODEL_FILE:
            raise _pickled(path) from None
        raise PretrainedError(
            f"{error.filename} does not exist",
            hint=f"A folder needs {', '.join(ENCODER_FILES)}; weights in several files are not read.",
        ) from None
    except OSError as error:
        hint = "Check the path in the settings, and who may read it."
        raise PretrainedError(f"{path} cannot be read: {error.strerror}", hint=hint) from None


def _pickled(path: Path) -> PretrainedError:
    return PretrainedError(
        f"{path} has pickled weights, which can run code when they are opened",
        hint="Only safetensors are read. Most publishers have them; else convert the file on a machine without data.",
    )


def _parse(digest: str, path: Path, contents: Mapping[str, bytes]) -> Base:
    try:
        tensors = {n: t.float() for n, t in load(contents[MODEL_FILE]).items() if t.is_floating_point()}
        if "config.json" not in contents:
            return _body(digest, tensors, contents[MODEL_FILE])
        return _encoder(digest, tensors, contents)
    except PretrainedError:
        raise
    except Exception as error:  # a base is a file from elsewhere: whatever its parsers say, it is the file's fault
        what = "is damaged" if isinstance(error, SafetensorError) else f"cannot be used ({type(error).__name__})"
        raise PretrainedError(f"{path} {what}", hint="Get it again from its publisher.") from None


def _encoder(digest: str, tensors: Mapping[str, Tensor], contents: Mapping[str, bytes]) -> Encoder:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an extra, and only some plans need it
    except ImportError:
        hint = "Install it: pip install 'konsil[pretrained]'."
        raise PretrainedError("a pretrained encoder needs transformers, which is not installed", hint=hint) from None
    config = json.loads(contents["config.json"])
    if "auto_map" in config:
        raise PretrainedError("a base that wants to run code of its own is refused", hint="Use a plain BERT.")
    for key, value in _FIXED.items():
        if config.get(key, value) != value or (key == "model_type" and key not in config):
            raise PretrainedError(
                f"a base with {key} = {config.get(key)!r} is not supported", hint=f"Supported is {key} = {value!r}."
            )
    shape = {key: _positive(config, key) for key in _SHAPE}
    tokenizer = Tokenizer.from_str(contents["tokenizer.json"].decode())
    if tokenizer.get_vocab_size() > shape["vocab_size"]:
        raise PretrainedError("the tokenizer has more tokens than the encoder", hint="They belong to two models.")
    plain = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    return Encoder(digest, shape, float(config.get("layer_norm_eps", 1e-12)), plain, tokenizer)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not (isinstance(value, int) and 0 < value <= 10_000_000):
        raise PretrainedError(f"the base's configuration has {key} = {value!r}", hint="It must be a positive number.")
    return value


def _body(digest: str, tensors: Mapping[str, Tensor], content: bytes) -> Body:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    plan = parse_plan_json(header.get("__metadata__", {}).get("plan", ""), "the base's plan")
    if not isinstance(plan.network, Cnn):
        raise PretrainedError(f"a base of network {plan.network.name} is not supported", hint="It must be a cnn.")
    blocks = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.")}
    origin = Origin(f"model of study {plan.study}", plan.data_licence)
    return Body(digest, origin, plan.network.channels, blocks["blocks.0.0.weight"].shape[1], blocks)
