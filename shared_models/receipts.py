"""Receipts: what a hospital signs when it uploads, kept by its coordinator and shown to it again.

What is shown again is an *anchor*: a hospital whose ledger lacks what it signed for has been rolled back.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import Field

from shared_models.config import ALWAYS_WRITTEN, Evolving, Name
from shared_models.errors import ForeignReceiptError, IdentityError
from shared_models.identity import verify

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Receipt(Evolving):
    """What a hospital signs with every upload: the ledger entry that paid for it, and what its study has cost so far.

    Attributes:
        entry_hash: SHA-256 of the charge entry.
        chain_head: Hash of the newest entry of the hospital's ledger.
        mechanism: The mechanism charged, as in the ledger.
        charges: Charges of this study so far.
        epsilon_filter: What the hospital's Renyi filter holds the study at so far, per patient.
        signature: Ed25519 signature of the hospital over all of the above and the request's study, round and attempt.
    """

    entry_hash: Digest
    chain_head: Digest
    mechanism: dict[str, Any]
    charges: Annotated[int, Field(ge=1)]
    epsilon_filter: Annotated[float, Field(ge=0)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class SignedReceipt(Evolving):
    """A receipt with everything that its signature covers: an upload, but for its vector.

    Attributes:
        type: The message that it came with.
    """

    type: Literal["Update", "ReleasedStatistics"]
    version: Annotated[Literal[1], ALWAYS_WRITTEN] = 1
    study: Name
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    attempt: Annotated[int, Field(ge=1, le=1_000)]
    context: Digest
    receipt: Receipt

    def payload(self) -> bytes:
        """What the hospital signs: all of this but the signature, in canonical JSON."""
        return rfc8785.dumps(self.model_dump(mode="json", exclude={"receipt": {"signature"}}))

    def check(self, public_key: bytes) -> None:
        """Check whose receipt it is.

        Raises:
            ForeignReceiptError: It was signed by another key, or changed.
        """
        try:
            verify(public_key, "receipt", self.payload(), bytes.fromhex(self.receipt.signature))
        except IdentityError:
            raise ForeignReceiptError(
                f"a receipt for study {self.study}, round {self.round} that its hospital did not sign",
                hint="It was changed, or is another hospital's. Whoever shows it is broken or lies.",
            ) from None

    @property
    def digest(self) -> str:
        """SHA-256 of the whole receipt with its signature, in hexadecimal."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()


def digest_of_all(receipts: Mapping[str, SignedReceipt]) -> str:
    """One digest over every hospital's last receipt: what the coordinator showed to one, it can show to all."""
    return hashlib.sha256(rfc8785.dumps({name: kept.digest for name, kept in receipts.items()})).hexdigest()


class Anchor(Evolving):
    """What a coordinator holds of a hospital, shown to it before anything new is asked.

    Attributes:
        last: The hospital's own last receipt, over all studies; None where the coordinator has none.
        everybody: ``digest_of_all`` of the last receipts of all hospitals.
    """

    last: Annotated[SignedReceipt | None, ALWAYS_WRITTEN] = None
    everybody: Annotated[Digest, ALWAYS_WRITTEN] = digest_of_all({})
