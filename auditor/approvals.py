"""Was every study run as it was approved? Plans against the ledger's approvals, and stewards' signatures under them."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from auditor.findings import Finding
from auditor.record import HospitalRecord, Line
from shared_models.approval import Approval, verify_approval
from shared_models.errors import ForgedApprovalError
from shared_models.plan import StudyPlan
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian


def check_approvals(record: HospitalRecord, approvals: Sequence[Approval], keys: Collection[bytes]) -> list[Finding]:
    """Compare a ledger's approvals with the plans and the signed approvals that its hospital kept.

    Guarantees:
        * What an approval set aside, and what it promises, is what its plan says, computed here from the plan.
        * Where a steward said yes, the steward's own signature is there, for this plan and this price.

    Args:
        record: With the plans.
        approvals: As the hospital kept them.
        keys: All keys of its ledger.
    """
    found: list[Finding] = []
    signed = {approval.signature: approval for approval in approvals}
    approved = [line for line in record.lines if line.kind in {"plan-approved", "plan-reapproved"}]
    for line in approved:
        plan = record.plans.get(line.study or "")
        problems = [] if plan is None and line.kind != "plan-approved" else list(_plan_problems(line, plan, record))
        problems += _signature_problems(line, signed, keys)
        found += [_about(record, line, code, what) for code, what in problems]
    for study in sorted(set(record.plans) - {line.study for line in approved}):
        what = "a plan is shown that the ledger never approved"
        found.append(Finding(code="plan-unknown", party=record.hospital, what=what, study=study))
    for approval in approvals:
        if not any(_holds(approval, key) for key in keys):
            what = "a steward's approval is shown that this hospital did not sign"
            found.append(Finding(code="forged-approval", party=record.hospital, what=what, study=approval.study))
    return list(dict.fromkeys(found))


def _about(record: HospitalRecord, line: Line, code: str, what: str) -> Finding:
    return Finding(code=code, party=record.hospital, what=what, study=line.study, entry=line.seq)


def _plan_problems(line: Line, plan: StudyPlan | None, record: HospitalRecord) -> Iterator[tuple[str, str]]:
    if plan is None:
        yield "plan-missing", "the plan that was approved is not among the evidence"
        return
    if plan.digest() != line.plan_digest:
        yield "plan-differs", f"plan {line.plan_digest} was approved, and plan {plan.digest()} is shown"
        return
    if line.limit is None or line.reservation is None:
        return
    promised = (plan.privacy.epsilon, plan.privacy.delta)
    if (line.limit.epsilon, line.limit.delta) != promised:
        yield (
            "price-differs",
            f"the plan promises epsilon {promised[0]:g} at delta {promised[1]:g}, and the approval does not",
        )
    reserved = {kept.mechanism: kept.charges for kept in line.reservation}
    expected = _costs(plan, record.terms.public_size)
    if reserved != expected or len(reserved) != len(line.reservation):
        yield "price-differs", f"the plan costs {_words(expected)}, and the approval set aside {_words(reserved)}"


def _costs(plan: StudyPlan, public_size: int) -> Mapping[PoissonGaussian | GaussianRelease, int]:
    """What a plan may charge; computed here, because what is checked was computed by the hospital's code."""
    privacy, released = plan.privacy, plan.evaluation
    training = PoissonGaussian(
        sample_rate=privacy.sample_rate,
        noise_multiplier=privacy.noise_multiplier,
        steps=plan.training.steps,
        clip=privacy.clip,
        expected_batch=privacy.sample_rate * public_size,
    )
    costs: Counter[PoissonGaussian | GaussianRelease] = Counter({training: plan.rounds + privacy.spare_charges})
    if released is not None and plan.rounds // released.every:
        release = GaussianRelease(noise_multiplier=released.noise_multiplier, clip=released.clip)
        costs[release] = plan.rounds // released.every
    return costs


def _words(costs: Mapping[PoissonGaussian | GaussianRelease, int]) -> str:
    def one(mechanism: PoissonGaussian | GaussianRelease, times: int) -> str:
        if isinstance(mechanism, PoissonGaussian):
            return (
                f"{times} rounds of {mechanism.steps} steps at sample rate {mechanism.sample_rate:g} and noise "
                f"{mechanism.noise_multiplier:g}"
            )
        return f"{times} releases at noise {mechanism.noise_multiplier:g}"

    return ", ".join(one(mechanism, times) for mechanism, times in costs.items()) or "nothing"


def _signature_problems(
    line: Line, signed: Mapping[str, Approval], keys: Collection[bytes]
) -> Iterator[tuple[str, str]]:
    if line.approved_by != "steward":
        return
    approval = signed.get(line.approval or "")
    if approval is None:
        yield "approval-missing", "the steward's signed approval is not among the evidence"
    elif not any(_holds(approval, key) for key in keys):
        yield "forged-approval", "the steward's approval is not signed by this hospital, or was changed"
    elif (approval.study, approval.plan_digest) != (line.study, line.plan_digest):
        yield "forged-approval", "the steward's approval is for another study, or another plan"
    elif line.limit is not None and approval.price.limit != line.limit:
        yield "forged-approval", "the steward was shown another price than was set aside"


def _holds(approval: Approval, key: bytes) -> bool:
    try:
        verify_approval(approval, key, study=approval.study, plan_digest=approval.plan_digest)
    except ForgedApprovalError:
        return False
    return True
