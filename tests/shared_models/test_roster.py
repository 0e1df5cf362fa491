"""A roster that the consortium's root key signed: what is accepted, and the message of everything that is not."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shared_models.errors import (
    ForeignRosterError,
    ForkedRosterError,
    MalformedRosterError,
    OlderRosterError,
    RepeatedMemberError,
    RosterSignatureError,
)
from shared_models.identity import fingerprint, public_bytes, sign
from shared_models.roster import (
    Coordinator,
    Member,
    Pin,
    SignedRoster,
    UnsignedRoster,
    members_now,
    sign_roster,
    verify_roster,
)

ROOT = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_bytes(ROOT)


def member(number: int, **changes: Any) -> Member:
    fields = {
        "name": f"hospital-{number}",
        "display_name": f"Hospital {number}",
        "identity": f"{number:064x}",
        "node_key": f"ecdsa-sha2-nistp384 AAAA{number}",
        "tls_key": f"{number + 1000:064x}",
        "public_size": 100,
        "valid_from": 1000,
        "valid_until": 2000,
    }
    return Member(**{**fields, **changes})


def roster(*members: Member, version: int = 2, root: bytes = PUBLIC) -> UnsignedRoster:
    coordinator = Coordinator(name="centre", address="centre.example.org:9092")
    return UnsignedRoster(
        consortium="test",
        version=version,
        coordinator=coordinator,
        members=members or (member(1), member(2), member(3)),
        root_fingerprint=fingerprint(root),
    )


SIGNED = sign_roster(ROOT, roster())


def as_bytes(signed: SignedRoster) -> bytes:
    return signed.model_dump_json(indent=2).encode()


def test_what_was_signed_is_accepted_however_it_is_spaced() -> None:
    """Bytes or a document, indented or not: the content counts."""
    assert verify_roster(as_bytes(SIGNED), PUBLIC) == SIGNED
    assert verify_roster(SIGNED.model_dump(mode="json"), PUBLIC) == SIGNED


def test_members_are_those_who_are_valid_and_not_revoked() -> None:
    """From the first second to the one before the end; a revoked one never."""
    found = roster(member(1), member(2, revoked=True), member(3, valid_from=1500), member(4, valid_until=1200))

    assert set(members_now(found, 1000).identities) == {"hospital-1", "hospital-4"}
    assert set(members_now(found, 1999.5).identities) == {"hospital-1", "hospital-3"}
    assert not members_now(found, 2000).identities


def test_the_same_members_have_the_same_digest_whatever_their_order() -> None:
    """Hospitals and coordinator compare digests; a new version with the same members changes nothing."""
    one, other = roster(member(1), member(2)), roster(member(2), member(1), version=9)

    assert members_now(one, 1500).digest == members_now(other, 1500).digest


@pytest.mark.parametrize("signature", [None, ""])
def test_an_unsigned_roster_is_refused(signature: str | None) -> None:
    """Without a signature it is nobody's."""
    document = {**SIGNED.model_dump(mode="json"), "signature": signature}

    with pytest.raises(RosterSignatureError, match="is not signed"):
        verify_roster(document, PUBLIC)


def test_a_signature_of_another_kind_is_refused() -> None:
    """A root key's signature for something else is no signature of a roster."""
    other = SIGNED.model_copy(update={"signature": sign(ROOT, "receipt", SIGNED.payload()).hex()})

    with pytest.raises(RosterSignatureError, match="not the consortium's"):
        verify_roster(as_bytes(other), PUBLIC)


@given(data=st.data())
def test_any_change_after_signing_is_found(data: st.DataObject) -> None:
    """A property: whichever field of whichever member is changed, the roster is refused."""
    changes = {"identity": "f" * 64, "node_key": "ecdsa-sha2-nistp384 BBBB", "tls_key": "e" * 64, "public_size": 101}
    changes |= {"valid_until": 9000, "revoked": True, "name": "another", "ledger_genesis": "d" * 64}
    field, number = data.draw(st.sampled_from(sorted(changes))), data.draw(st.integers(0, 2))
    document = SIGNED.model_dump(mode="json")
    document["members"][number][field] = changes[field]

    with pytest.raises(RosterSignatureError):
        verify_roster(document, PUBLIC)


def test_another_root_is_refused_and_named() -> None:
    """Also one that signed properly with its own key, and one that claims the pinned fingerprint."""
    root = Ed25519PrivateKey.generate()
    foreign = sign_roster(root, roster(root=public_bytes(root)))
    claimed = foreign.model_copy(update={"root_fingerprint": fingerprint(PUBLIC)})

    with pytest.raises(ForeignRosterError, match="another root key"):
        verify_roster(as_bytes(foreign), PUBLIC)
    with pytest.raises(RosterSignatureError):
        verify_roster(as_bytes(claimed), PUBLIC)
    with pytest.raises(ForeignRosterError):
        sign_roster(root, roster())


def test_an_older_roster_is_refused_and_a_newer_one_taken() -> None:
    """A revoked hospital may be on the older one."""
    with pytest.raises(OlderRosterError, match="version 2 is older than version 3"):
        verify_roster(as_bytes(SIGNED), PUBLIC, pinned=Pin(3, "0" * 64))

    assert verify_roster(as_bytes(SIGNED), PUBLIC, pinned=Pin(2, SIGNED.digest)).version == 2
    assert verify_roster(as_bytes(SIGNED), PUBLIC, pinned=Pin(1, "0" * 64)).version == 2


def test_two_rosters_of_one_version_are_refused() -> None:
    """The consortium signs one list per version."""
    other = sign_roster(ROOT, roster(member(1), member(2)))

    with pytest.raises(ForkedRosterError, match="differs"):
        verify_roster(as_bytes(other), PUBLIC, pinned=Pin(2, SIGNED.digest))


@pytest.mark.parametrize("what", ["name", "identity", "node_key", "tls_key"])
def test_two_members_share_nothing(what: str) -> None:
    """Neither when it is signed nor when it is read."""
    first = member(1)
    twice = roster(first, member(2, **{what: getattr(first, what)}, revoked=True))
    signed = SignedRoster(**twice.model_dump(), signature=sign(ROOT, "roster", twice.payload()).hex())

    with pytest.raises(RepeatedMemberError, match=f"same {what}"):
        sign_roster(ROOT, twice)
    with pytest.raises(RepeatedMemberError, match=f"same {what}"):
        verify_roster(as_bytes(signed), PUBLIC)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff", b"{", b'{"signature": "' + b"0" * 128 + b'"}', json.dumps({"north": "0" * 64}).encode()],
)
def test_what_is_no_roster_is_refused(content: bytes) -> None:
    """Never with a traceback, and a map of names to keys as it was before is not taken for one."""
    with pytest.raises((MalformedRosterError, RosterSignatureError)):
        verify_roster(content, PUBLIC)


def test_a_member_ends_after_it_begins() -> None:
    """A validity turned around is malformed."""
    document = SIGNED.model_dump(mode="json")
    document["members"][0]["valid_until"] = 0

    with pytest.raises(MalformedRosterError, match="valid_until"):
        verify_roster(document, PUBLIC)
