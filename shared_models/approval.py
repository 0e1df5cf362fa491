"""A steward's approval of one study, both halves: signing what was shown with its price, and checking it again."""

from typing import Annotated, Any, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from shared_models.config import ALWAYS_WRITTEN, Evolving, Name, Positive
from shared_models.errors import ForgedApprovalError, IdentityError
from shared_models.identity import sign, verify
from shared_models.privacy.entries import BudgetTerms, Digest, Signature, StudyLimit, Time

KIND = "study-approval"
_HINT = "Nothing was approved. Look who wrote the file, then run konsil-hospital approve again."


class ApprovedPrice(Evolving):
    """What the steward was shown; per patient, by the hospital's Rényi filter.

    Attributes:
        epsilon: What the whole study may cost, at the plan's delta.
        limit: What the plan promises to stay within.
        left_before: Epsilon of the budget that nothing had spent or reserved, at the budget's delta.
        left_after: The same with this study.
        budget: Terms of the budget: epsilon, delta, order, unit, neighbouring relation.
    """

    epsilon: Positive
    limit: StudyLimit
    left_before: Annotated[float, Field(allow_inf_nan=False)]
    left_after: Annotated[float, Field(allow_inf_nan=False)]
    budget: BudgetTerms


class Approval(Evolving):
    """A steward's yes to exactly this plan, at this price, computed by this software.

    Attributes:
        software_digest: ``software.software_digest`` of what was installed; None in approvals of release 0.1.0, which
            did not say.
        time: UTC, by the hospital's own clock.
        signature: Ed25519 by the hospital's identity key over the canonical JSON of all the other fields.
    """

    format: Annotated[Literal["konsil-approval/1"], ALWAYS_WRITTEN] = "konsil-approval/1"
    study: Name
    plan_digest: Digest
    price: ApprovedPrice
    time: Time
    software_digest: Digest | None = None
    signature: Signature

    def payload(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON (RFC 8785)."""
        return rfc8785.dumps(self.model_dump(mode="json", exclude={"signature"}))


def sign_approval(key: Ed25519PrivateKey, **fields: Any) -> Approval:
    """Sign an approval; the fields are those of ``Approval``.

    Guarantees:
        * The signature's kind is its own: it can be shown as nothing else that this key signs, nor anything else as it.
    """
    unsigned = Approval(**fields, signature="0" * 128)
    return unsigned.model_copy(update={"signature": sign(key, KIND, unsigned.payload()).hex()})


def verify_approval(approval: Approval, public_key: bytes, *, study: str, plan_digest: str) -> None:
    """Check that this hospital's key signed this approval, and for this plan.

    Raises:
        ForgedApprovalError: Another key signed, or something in it was changed; or it is for another study or plan.
    """
    if approval.study != study or approval.plan_digest != plan_digest:
        raise ForgedApprovalError(
            f"the approval of study {study} is for plan {approval.plan_digest[:12]} of study {approval.study}; "
            f"proposed is plan {plan_digest[:12]}",
            hint="A changed plan needs an approval of its own: run konsil-hospital approve again.",
        )
    try:
        verify(public_key, KIND, approval.payload(), bytes.fromhex(approval.signature))
    except IdentityError:
        raise ForgedApprovalError(
            f"the approval of study {study} was not signed by this hospital's key, or was changed since", hint=_HINT
        ) from None
