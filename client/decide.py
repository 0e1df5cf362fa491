"""The steward's desk: which studies there are, what one of them would mean, and the signed yes to it.

The daemon holds the lock on the ledger; here it is only read. What is decided lies in files until the daemon sees it.
"""

from datetime import UTC, datetime
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from client.books import read_budget
from client.budget import Budget, holds
from client.consent import Consents, Proposed
from client.device import choose_device
from client.disclosure import Facts, Rows, disclose, in_words, named_only
from client.policy import Site, admit
from client.settings import Settings
from shared_models.approval import ApprovedPrice, sign_approval
from shared_models.errors import ConfigError, FederationError, PolicyError
from shared_models.identity import load_key
from shared_models.nets.build import count_parameters
from shared_models.pretrained import check_copy, offer_bases
from shared_models.privacy.ledger import StudyLimit
from shared_models.software import software_digest
from shared_models.tasks import task_of

SHORTEST_DIGEST = 8
STEWARD, _COORDINATOR = "the steward", "the coordinator, to propose it again"


class Listed(NamedTuple):
    """One study, as the list shows it.

    Attributes:
        status: ``pending``, ``approved``, ``refused`` or ``closed``.
        by: Who approved it, or what it waits for.
        epsilon: The most that its plan promises to cost; None where it was refused.
        time: When it was proposed, approved or refused, UTC.
        reason: Why the steward refused it, where that was said.
    """

    study: str
    status: str
    by: str
    epsilon: float | None
    plan_digest: str
    time: str
    reason: str = ""


class Weighed(NamedTuple):
    """A study that may be approved, with all that the steward has to know."""

    proposal: Proposed
    budget: Budget
    facts: Facts


def list_studies(settings: Settings, budget: Budget | None = None) -> list[Listed]:
    """Every study that this hospital knows; what the ledger says comes first.

    Args:
        settings: The hospital's own.
        budget: As the ledger has it now, where that was read already.

    Raises:
        LedgerError: There is no ledger yet, it cannot be read, or its chain is broken.
    """
    consents, found = Consents(settings.state), []
    budget = budget or read_budget(settings)
    waiting = {proposal.study: proposal for proposal in consents.waiting()}
    for entry, closed in budget.approvals():
        study = entry.study or ""
        status, time = "closed" if closed else "approved", entry.time
        by: str = entry.approved_by or ""
        if not closed and not holds(entry):
            status, by = "pending", _COORDINATOR
            if study in waiting and not _agreed(consents, study):
                by, time = f"{STEWARD}: the software changed", waiting[study].time
        waiting.pop(study, None)
        found.append(Listed(study, status, by, budget.limit(study).epsilon, entry.plan_digest or "", time))
    for study, proposal in waiting.items():
        by = _COORDINATOR if _agreed(consents, study) else STEWARD
        found.append(Listed(study, "pending", by, proposal.plan.privacy.epsilon, proposal.plan_digest, proposal.time))
    found += [Listed(r.study, "refused", "steward", None, r.plan_digest, r.time, r.reason) for r in consents.refusals()]
    return found


def _agreed(consents: Consents, study: str) -> bool:
    """Whether there is a steward's approval for the software that is installed here."""
    approval = consents.approved(study)
    return approval is not None and approval.software_digest == software_digest()


def studies_table(found: list[Listed]) -> Table:
    """The list for a terminal."""
    table = Table()
    for heading in ("study", "status", "by, or waits for", "epsilon, at most", "plan", "since (UTC)"):
        table.add_column(heading, overflow="fold")
    for study in found:
        epsilon = "" if study.epsilon is None else f"{study.epsilon:g}"
        by = f"{study.by}: {study.reason}" if study.reason else study.by
        table.add_row(*map(Text, (study.study, study.status, by, epsilon, study.plan_digest[:12], study.time[:16])))
    return table


def weigh(settings: Settings, study: str) -> Weighed:
    """A waiting study, once it is certain that the policy permits it and the budget can pay for it.

    Raises:
        ConfigError: No study of that name waits.
        PolicyError, BudgetExhaustedError: Policy or budget have changed since it was proposed; with the numbers.
        RecordsError: The records do not fit its task.
    """
    proposal, budget = find(settings, study), read_budget(settings)
    plan = proposal.plan
    offer_bases(settings.pretrained)
    check_copy(plan.network, settings.pretrained)
    site = Site(settings.coordinator, choose_device(settings).type, count_parameters(plan.network, task_of(plan)))
    admit(plan, settings.policy, settings.population, site)
    known = budget.check(plan)
    if known is not None and holds(known):
        raise PolicyError(f"study {study} is approved already", hint="See: konsil-hospital studies hospital.toml")
    return Weighed(proposal, budget, disclose(settings, plan, budget, before=known))


def glance(settings: Settings, study: str) -> tuple[Proposed, Rows]:
    """A waiting study as far as it can be shown: to say no, neither policy nor records have to fit.

    Raises:
        ConfigError: No study of that name waits.
    """
    proposal = find(settings, study)
    offer_bases(settings.pretrained)
    try:
        return proposal, in_words(disclose(settings, proposal.plan, read_budget(settings)))
    except FederationError as error:
        return proposal, [*in_words(named_only(proposal.plan)), ("not shown", str(error))]


def confirm_digest(proposal: Proposed, digest: str) -> None:
    """Hold the plan against a digest that a person has checked.

    Raises:
        ConfigError: It is too short, or another plan's.
    """
    if len(digest) < SHORTEST_DIGEST or not proposal.plan_digest.startswith(digest):
        raise ConfigError(
            f"plan {proposal.plan_digest} does not begin with {digest!r}, of at least {SHORTEST_DIGEST} digits",
            hint="Compare the digest with the one that you were told. Nothing was approved.",
        )


def sign_and_keep(settings: Settings, weighed: Weighed) -> None:
    """Sign exactly what was shown, and put it where the daemon looks."""
    plan, budget = weighed.proposal.plan, weighed.budget
    price = budget.price(plan)
    approval = sign_approval(
        load_key(settings.keys.identity),
        study=plan.study,
        plan_digest=plan.digest(),
        price=ApprovedPrice(
            epsilon=price.study_epsilon_filter,
            limit=StudyLimit(epsilon=plan.privacy.epsilon, delta=plan.privacy.delta),
            left_before=price.left_before,
            left_after=price.left_after,
            budget=budget.terms,
        ),
        time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        software_digest=software_digest(),
    )
    Consents(settings.state).approve(approval)


def find(settings: Settings, study: str) -> Proposed:
    """The proposal of a study that waits.

    Raises:
        ConfigError: None of that name waits, or it was refused.
    """
    consents = Consents(settings.state)
    if consents.refused(study) is not None:
        raise ConfigError(f"study {study} was refused here", hint="A name is used once: propose it under a new one.")
    return consents.find(study)


def facts_table(rows: Rows) -> Table:
    """What a study would mean, for a terminal."""
    table = Table.grid(padding=(0, 2))
    for heading, text in rows:
        table.add_row(Text(heading, style="bold"), Text(text))
    return table
