"""Keys are private files; a signature is worth something for one key, one kind and one payload only."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from shared_models.errors import IdentityError
from shared_models.identity import create_key, fingerprint, load_key, public_bytes, read_public, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KINDS = st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True)


def test_a_key_survives_the_disk(tmp_path: Path) -> None:
    """What is loaded is what was created."""
    created = create_key(tmp_path / "key")

    loaded = load_key(tmp_path / "key")

    assert public_bytes(loaded) == public_bytes(created)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_new_key_is_readable_by_its_owner_alone(tmp_path: Path, umask: int) -> None:
    """Whatever the process's umask says."""
    before = os.umask(umask)
    try:
        create_key(tmp_path / "key")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_an_identity_is_never_replaced(tmp_path: Path) -> None:
    """A second key in its place would make the hospital's own ledger foreign to it."""
    key = create_key(tmp_path / "key")

    with pytest.raises(IdentityError, match="exists already"):
        create_key(tmp_path / "key")

    assert public_bytes(load_key(tmp_path / "key")) == public_bytes(key)


def test_a_key_that_cannot_be_written_is_an_identity_error(tmp_path: Path) -> None:
    """And leaves nothing behind."""
    with pytest.raises(IdentityError, match="cannot be written"):
        create_key(tmp_path / "nowhere" / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """The hint is the command that mends it."""
    create_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)

    with pytest.raises(IdentityError, match="open to others") as caught:
        load_key(tmp_path / "key")

    assert caught.value.hint == f"Run: chmod 600 {tmp_path / 'key'}"


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """The person who reads this has to find the file."""
    with pytest.raises(IdentityError, match="absent"):
        load_key(tmp_path / "absent")


def test_what_is_no_ed25519_key_is_refused_without_quoting_it(tmp_path: Path) -> None:
    """Noise, a cut file, or a key of another kind: the error says what is expected and shows nothing of the content."""
    whole = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    other = generate_private_key(SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"secret-words", whole[:60], other):
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(0o600)

        with pytest.raises(IdentityError, match="no Ed25519 private key") as caught:
            load_key(path)

        assert "secret" not in str(caught.value)


@given(kind=KINDS, payload=st.binary(max_size=100))
def test_a_signature_verifies_for_what_was_signed(kind: str, payload: bytes) -> None:
    """The other half agrees."""
    verify(public_bytes(KEY), kind, payload, sign(KEY, kind, payload))


@given(kinds=st.tuples(KINDS, KINDS), payloads=st.tuples(st.binary(max_size=20), st.binary(max_size=20)))
def test_a_signature_verifies_for_nothing_else(kinds: tuple[str, str], payloads: tuple[bytes, bytes]) -> None:
    """Another kind or another payload, also where letters could wander from one to the other."""
    signature = sign(KEY, kinds[0], payloads[0])

    for kind, payload in ((kinds[1], payloads[0]), (kinds[0], payloads[1]), (kinds[0] + "a", payloads[0][1:])):
        if (kind, payload) != (kinds[0], payloads[0]):
            with pytest.raises(IdentityError):
                verify(public_bytes(KEY), kind, payload, signature)


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_a_changed_signature_is_refused(position: int, bit: int) -> None:
    """Any bit of it."""
    signature = bytearray(sign(KEY, "receipt", b"payload"))
    signature[position] ^= 1 << bit

    with pytest.raises(IdentityError):
        verify(public_bytes(KEY), "receipt", b"payload", bytes(signature))


def test_another_key_or_no_key_is_refused() -> None:
    """Wrong lengths included: a peer's bytes never cause anything but an identity error."""
    signature = sign(KEY, "receipt", b"payload")
    other = public_bytes(Ed25519PrivateKey.generate())

    for public, given_signature in ((other, signature), (b"", signature), (other[:31], signature), (other, b"")):
        with pytest.raises(IdentityError):
            verify(public, "receipt", b"payload", given_signature)


def test_a_raw_signature_of_the_same_bytes_does_not_pass() -> None:
    """What another program signs with this key is never one of our statements."""
    with pytest.raises(IdentityError):
        verify(public_bytes(KEY), "receipt", b"payload", KEY.sign(b"payload"))


@pytest.mark.parametrize("kind", ["", "Receipt", "a\0b", "a b", "x" * 65])
def test_a_kind_is_a_short_plain_word(kind: str) -> None:
    """A NUL inside would let two pairs of kind and payload share their bytes."""
    with pytest.raises(ValueError, match="a kind is"):
        sign(KEY, kind, b"")


def test_a_public_key_file_is_hexadecimal(tmp_path: Path) -> None:
    """As the coordinator keeps them; anything else is refused."""
    path = tmp_path / "key.pub"
    path.write_text(public_bytes(KEY).hex() + "\n", encoding="ascii")

    assert read_public(path) == public_bytes(KEY)
    for content in ("", "00" * 31, "zz" * 32, "00" * 33):
        path.write_text(content, encoding="ascii")
        with pytest.raises(IdentityError, match="no public key"):
            read_public(path)
    with pytest.raises(IdentityError, match="cannot be read"):
        read_public(tmp_path / "absent")


def test_fingerprints_tell_keys_apart() -> None:
    """Equal for equal keys, and of a form that can be read out on the telephone."""
    assert fingerprint(public_bytes(KEY)) == fingerprint(public_bytes(KEY))
    assert fingerprint(public_bytes(KEY)) != fingerprint(public_bytes(Ed25519PrivateKey.generate()))
    assert {len(group) for group in fingerprint(public_bytes(KEY)).split(":")} == {4}
