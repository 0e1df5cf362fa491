"""A file from a public source, or a local copy of it: nothing reads it before its length and its digest are right."""

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from client.deadline import Deadline
from shared_models.errors import ConfigError, TransferError

_SILENCE_S = 30.0  # without a byte
_LONGEST_S = 600.0  # with all redirections
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Pinned:
    """One file as its publisher made it.

    Attributes:
        name: Of the file.
        url: Where the publisher has it; ``https`` only.
        most: Bytes that it has at most.
        digests: Any one of which its content must have, as ``sha256:`` or ``md5:`` and hexadecimal digits. MD5 only
            where a publisher states nothing else: nobody can make a second file with a given digest but whoever made
            the first.
    """

    name: str
    url: str
    most: int
    digests: tuple[str, ...]


def fetch(pinned: Pinned, *, say: Callable[[str], None]) -> bytes:
    """Download a file into memory.

    Guarantees:
        * It never goes over a connection without TLS, also where it is redirected, and nothing is written.
        * No more than ``pinned.most`` bytes are taken, for ten minutes at most.

    Args:
        pinned: The file.
        say: Told how far it is.

    Raises:
        TransferError: The source cannot be reached, or sent more, or something else.
        ConfigError: The address is not one of ``https``.
    """
    _refuse_plain(pinned.url)
    client = httpx.Client(
        verify=ssl.create_default_context(),
        timeout=_SILENCE_S,
        follow_redirects=True,
        headers={"accept-encoding": "identity"},
        event_hooks={"request": [lambda request: _refuse_plain(str(request.url))]},
    )
    try:
        with client:
            Deadline(client).begin(_LONGEST_S)
            with client.stream("GET", pinned.url) as answer:
                answer.raise_for_status()
                content = _read(pinned, answer, say)
    except httpx.HTTPStatusError as error:
        raise _unreachable(pinned, f"status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise _unreachable(pinned, str(error) or type(error).__name__) from None
    return checked(pinned, content)


def read_copy(pinned: Pinned, path: Path) -> bytes:
    """Read a local copy of a file: ``path`` itself, or the file of that name in the folder ``path``.

    Raises:
        ConfigError: There is none.
        TransferError: It is another file.
    """
    file = path / pinned.name if path.is_dir() else path
    try:
        if file.stat().st_size > pinned.most:
            raise _another(pinned, f"{file} has {file.stat().st_size} bytes, and at most {pinned.most} are expected")
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", hint="Check --data.") from None
    return checked(pinned, content)


def checked(pinned: Pinned, content: bytes) -> bytes:
    """The content, if it is the file.

    Raises:
        TransferError: It is longer, or none of the pinned digests is its own.
    """
    if len(content) > pinned.most:
        raise _another(pinned, f"{pinned.name} is longer than {pinned.most} bytes")
    found = {digest: _digest(digest.partition(":")[0], content) for digest in pinned.digests}
    if not any(pin == own for pin, own in found.items()):
        own = _digest("sha256", content)
        raise _another(pinned, f"{pinned.name} has digest {own}, and not {' or '.join(pinned.digests)}")
    return content


def _unreachable(pinned: Pinned, why: str) -> TransferError:
    return TransferError(
        f"{pinned.url} cannot be fetched: {why}", hint=f"Fetch {pinned.name} in another way, and give it as --data."
    )


def _another(pinned: Pinned, what: str) -> TransferError:
    return TransferError(
        f"{what}: it was not used, and nothing of it was kept",
        hint=f"It is not the file that {urlsplit(pinned.url).hostname} had when this was released. Find out why.",
    )


def _digest(kind: str, content: bytes) -> str:
    return f"{kind}:{hashlib.new(kind, content, usedforsecurity=kind != 'md5').hexdigest()}"


def _read(pinned: Pinned, answer: httpx.Response, say: Callable[[str], None]) -> bytes:
    content = bytearray()
    for piece in answer.iter_raw(_AT_ONCE):
        content += piece
        if len(content) > pinned.most:
            raise _another(pinned, f"{pinned.name} is longer than {pinned.most} bytes")
        say(f"{pinned.name}: {len(content)} of at most {pinned.most} bytes")
    say("")
    return bytes(content)


def _refuse_plain(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise ConfigError(f"{url} is not an address of https", hint="Nothing is fetched without TLS.")
