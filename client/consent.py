"""Who said yes: studies that wait for the steward, and the steward's answers, as files in ``state/studies``.

The daemon writes what was proposed; the commands ``approve`` and ``refuse`` write the answer beside it, while the
daemon runs. The daemon looks at the answer when the coordinator proposes the study again.

    STUDY.json           waits: the plan, its digest, when it came
    STUDY.approval.json  the steward's signed approval; kept for good
    STUDY.approval.SOFTWARE.json  an older one, of the time before the software was changed; kept for good
    STUDY.plan.json      the plan that was approved; kept for good
    STUDY.refused.json   the steward's no; kept for good, because a name is used once
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import rfc8785
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from shared_models.approval import Approval, verify_approval
from shared_models.config import ALWAYS_WRITTEN, Evolving, Frozen, Name
from shared_models.durable import replace_file
from shared_models.errors import (
    ConfigError,
    ForgedApprovalError,
    LedgerError,
    PendingError,
    PolicyError,
    SoftwareChangedError,
    UnsupportedApprovalError,
    UnsupportedFileError,
)
from shared_models.plan import StudyPlan
from shared_models.privacy.entries import Digest, Entry, Time
from shared_models.terminal import printable
from shared_models.versions import refuse_version

log = logging.getLogger("konsil.hospital")

STUDIES = "studies"
MOST_WAITING = 20
LONGEST_REASON = 500  # characters
LARGEST_PLAN_BYTES = 100_000  # in canonical JSON; an ordinary plan has one or two thousand

_File = TypeVar("_File", bound=Frozen)


class Consent(NamedTuple):
    """How a study came to be approved: by whom, and by what signature where a steward did."""

    approved_by: Literal["steward", "standing-rule"]
    approval: str | None = None


class Proposed(Frozen):
    """A study that was proposed, as it lies on the disk.

    Attributes:
        time: When this plan came first, UTC.
    """

    format: Literal["konsil-proposal/1"] = "konsil-proposal/1"
    study: Name
    plan_digest: Digest
    time: Time
    plan: StudyPlan

    @model_validator(mode="after")
    def _is_whole(self) -> "Proposed":
        if (self.study, self.plan_digest) != (self.plan.study, self.plan.digest()):
            raise ValueError("name, digest and plan do not belong together")
        return self


class Refused(Evolving):
    """The steward's no to a study, whatever its plan.

    Attributes:
        plan_digest: The plan that was refused.
        time: When, UTC.
        reason: Why, in the steward's words; nobody else hears of it.
    """

    format: Annotated[Literal["konsil-refusal/1"], ALWAYS_WRITTEN] = "konsil-refusal/1"
    study: Name
    plan_digest: Digest
    time: Time
    reason: Annotated[str, Field(max_length=LONGEST_REASON)] = ""


class Consents:
    """The folder of proposals and answers.

    Guarantees:
        * A coordinator can make it hold ``MOST_WAITING`` files of ``LARGEST_PLAN_BYTES``, and no more; each further
          file is an answer that the steward gave, or a study that the budget approved.
        * No record is read for any of it.

    Args:
        state: The hospital's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state / STUDIES

    def of(
        self, plan: StudyPlan, public_key: bytes, *, software: str, stands: bool, before: Entry | None = None
    ) -> Consent:
        """Whether somebody approved exactly this plan for this software; if nobody did, it waits from now on.

        Args:
            plan: Permitted by the policy, and affordable.
            public_key: The hospital's own.
            software: Digest of the software that runs here.
            stands: Whether a standing rule of the policy covers it.
            before: The ledger's approval of the same study for other software.

        Raises:
            PendingError: It waits for the steward.
            SoftwareChangedError: It does, because the approval there is was for other software.
            ForgedApprovalError: There is an approval that does not hold for it; it waits.
            PolicyError: The steward refused the study; or it could wait, and too many do.
        """
        if self.refused(plan.study) is not None:
            raise PolicyError(
                f"study {plan.study} was refused by this hospital's steward",
                hint="Names are used once: a study that differs needs a new one.",
            )
        try:
            approval = self.approved(plan.study)
            if approval is not None:
                verify_approval(approval, public_key, study=plan.study, plan_digest=plan.digest())
                if approval.software_digest == software:
                    return Consent("steward", approval.signature)
        except (ForgedApprovalError, UnsupportedApprovalError):
            self._keep(plan)
            raise
        if stands:
            return Consent("standing-rule")
        self._keep(plan)
        old = approval or before
        if old is not None:
            raise SoftwareChangedError(
                f"study {plan.study} waits for the steward: it was approved for {named(old.software_digest)}, and "
                f"{named(software)} runs here",
                hint=f"Run: konsil-hospital approve hospital.toml {plan.study}; if that was done after an update, "
                "restart the daemon.",
            )
        raise PendingError(
            f"study {plan.study} waits for the steward", hint=f"Run: konsil-hospital approve hospital.toml {plan.study}"
        )

    def _keep(self, plan: StudyPlan) -> None:
        """Write a proposal down, unless exactly this one waits already; a changed plan takes the place of the old."""
        path, digest = self._file(plan.study, "json"), plan.digest()
        before = self._read(plan.study, "json", Proposed)
        if before is not None and before.plan_digest == digest:
            return
        size = len(plan.canonical())
        if size > LARGEST_PLAN_BYTES:
            raise PolicyError(
                f"study {plan.study}: a plan of {size} bytes is too large to wait here",
                hint=f"At most {LARGEST_PLAN_BYTES} bytes of canonical JSON.",
            )
        if before is None and len(self.waiting()) >= MOST_WAITING:
            raise PolicyError(
                f"study {plan.study} cannot wait: {MOST_WAITING} studies wait for the steward already",
                hint="Have the steward approve or refuse some of them.",
            )
        self._write(path, Proposed(study=plan.study, plan_digest=digest, time=_now(), plan=plan))
        what = "waits for the steward" if before is None else "changed its plan, and waits for the steward"
        log.info("study %s %s: plan %s", plan.study, what, digest)

    def waiting(self) -> list[Proposed]:
        """Proposals that no steward has answered yet or whose approval no daemon has taken up yet, oldest first."""
        found = (self._read(name, "json", Proposed) for name in self._names(".json"))
        return sorted((proposal for proposal in found if proposal is not None), key=lambda p: (p.time, p.study))

    def find(self, study: str) -> Proposed:
        """The proposal of that name.

        Raises:
            ConfigError: None waits.
        """
        found = self._read(study, "json", Proposed)
        if found is None:
            raise ConfigError(f"no study {study} waits here", hint="See: konsil-hospital studies hospital.toml")
        return found

    def proposed(self, study: str) -> Proposed | None:
        """A study as it was proposed, whether it waits or was approved by the steward; None of any other."""
        return self._read(study, "plan.json", Proposed) or self._read(study, "json", Proposed)

    def approved(self, study: str) -> Approval | None:
        """The steward's approval, as it lies on the disk; who uses it verifies it first."""
        return self._read(study, "approval.json", Approval)

    def approve(self, approval: Approval) -> None:
        """Put the steward's approval where the daemon looks for it; one for other software is set aside."""
        path = self._file(approval.study, "approval.json")
        with suppress(ForgedApprovalError, UnsupportedApprovalError):
            before = self.approved(approval.study)
            if before is not None and before.software_digest != approval.software_digest:
                path.replace(path.with_suffix(f".{(before.software_digest or 'unknown')[:12]}.json"))
        self._write(self._file(approval.study, "approval.json"), approval)

    def refused(self, study: str) -> Refused | None:
        """The steward's refusal, if there is one."""
        return self._read(study, "refused.json", Refused)

    def refusals(self) -> list[Refused]:
        """All of them, oldest first."""
        found = (self.refused(name) for name in self._names(".refused.json"))
        return sorted((refusal for refusal in found if refusal is not None), key=lambda r: (r.time, r.study))

    def refuse(self, proposal: Proposed, reason: str = "") -> None:
        """Say no for good: first the answer, then the proposal and any approval go.

        Raises:
            ConfigError: The reason is too long.
        """
        study, reason = proposal.study, printable(reason)
        if len(reason) > LONGEST_REASON:
            raise ConfigError(f"a reason of {len(reason)} characters", hint=f"At most {LONGEST_REASON}.")
        refusal = Refused(study=study, plan_digest=proposal.plan_digest, time=_now(), reason=reason)
        self._write(self._file(study, "refused.json"), refusal)
        self._file(study, "approval.json").unlink(missing_ok=True)
        self._file(study, "json").unlink(missing_ok=True)

    def settle(self, plan: StudyPlan) -> None:
        """The ledger holds the approval: the plan is kept for auditors, and waits no more."""
        waited = self._read(plan.study, "json", Proposed)
        if waited is not None and waited.plan_digest == plan.digest():
            self._file(plan.study, "json").replace(self._file(plan.study, "plan.json"))
            return
        if not self._file(plan.study, "plan.json").exists():
            kept = Proposed(study=plan.study, plan_digest=plan.digest(), time=_now(), plan=plan)
            self._write(self._file(plan.study, "plan.json"), kept)
        self._file(plan.study, "json").unlink(missing_ok=True)

    def plans(self) -> list[StudyPlan]:
        """Those that were approved here, oldest first."""
        found = (self._read(name, "plan.json", Proposed) for name in self._names(".plan.json"))
        return [kept.plan for kept in sorted((p for p in found if p is not None), key=lambda p: (p.time, p.study))]

    def approvals(self) -> list[Approval]:
        """The steward's, also those for software of before; oldest first."""
        paths = self._folder.glob("*.approval*.json")
        found = [Approval.model_validate_json(path.read_bytes()) for path in paths]
        return sorted(found, key=lambda approval: (approval.time, approval.study))

    def _names(self, ending: str) -> Iterator[str]:
        """Studies that have a file of this ending; a name holds no dot, so that no ending hides in another."""
        for path in self._folder.glob(f"*{ending}"):
            if "." not in (name := path.name.removesuffix(ending)):
                yield name

    def _file(self, study: str, ending: str) -> Path:
        try:
            return self._folder / f"{TypeAdapter(Name).validate_python(study)}.{ending}"
        except ValidationError:
            raise ConfigError(f"{study!r} is no name of a study", hint="See: konsil-hospital studies") from None

    def _read(self, study: str, ending: str, model: type[_File]) -> _File | None:
        path = self._file(study, ending)
        try:
            return model.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            if isinstance(error, ValidationError):
                refuse_version(
                    error, path.name, UnsupportedApprovalError if model is Approval else UnsupportedFileError
                )
            kind = ForgedApprovalError if model is Approval else ConfigError
            raise kind(f"{path.name} is damaged or cannot be read", hint=f"Remove {path}.") from None

    def _write(self, path: Path, content: Frozen) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(path, rfc8785.dumps(content.model_dump(mode="json")))
        except OSError as error:
            raise LedgerError(f"{path} cannot be written: {error.strerror}", hint="Check the disk.") from None


def named(software: str | None) -> str:
    """Software by the beginning of its digest, for people."""
    return f"software {software[:12]}" if software else "unknown software"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
