"""What a steward reads before deciding on a study: who, what, from which columns, what leaves, and what it costs.

True counts are for the steward's own terminal. Nothing of this leaves the hospital.
"""

from client.budget import Budget, Price
from client.consent import named
from client.membership import read_roster
from client.policy import Policy
from client.records.labels import label_columns
from client.records.manifest import Manifest, read_manifest
from client.records.population import Source
from client.settings import Settings
from shared_models.encoding import NULL_COORDINATES
from shared_models.nets.build import count_parameters
from shared_models.plan import StudyPlan
from shared_models.pretrained import base_of
from shared_models.privacy.entries import Entry
from shared_models.privacy.mechanisms import NEIGHBOURING, UNIT
from shared_models.secagg.protocol import plan_threshold
from shared_models.software import software_digest
from shared_models.tasks import TableInput, Task, task_of
from shared_models.terminal import printable
from shared_models.versions import RELEASE

Rows = list[tuple[str, str]]


def disclose(settings: Settings, plan: StudyPlan, budget: Budget, *, before: Entry | None = None) -> Rows:
    """All of it, as pairs of a heading and a text; reads the records to count patients.

    Args:
        settings: The hospital's own.
        plan: What is to be decided on.
        budget: As the ledger has it.
        before: The ledger's approval of this study for other software, if that is why the steward is asked.

    Raises:
        FederationError: The task is not installed, the records do not fit it, or there is no roster.
    """
    task = task_of(plan)
    manifest = read_manifest(settings.records)
    return [
        ("study", f"{plan.study}, plan {plan.digest()}"),
        ("purpose", printable(plan.purpose)),
        ("data licence", printable(plan.data_licence)),
        ("coordinator", f"{settings.coordinator}, as its TLS certificate proves"),
        *_software(plan, budget, before),
        *_peers(settings, plan),
        *_training(settings, plan, task, manifest),
        *_leaving(settings.policy, plan, task),
        *_costs(plan, budget, again=before is not None),
    ]


def _software(plan: StudyPlan, budget: Budget, before: Entry | None) -> Rows:
    rows = [("software", f"Konsil {RELEASE}, {software_digest()}")]
    if before is not None:
        made, reserved = budget.charges(plan.study)
        rows.append(
            (
                "asked again",
                f"this study was approved for {named(before.software_digest)} on {before.time[:10]}, and the software "
                f"here has changed since; {made} of its {reserved} charges are made; the price below is that of the "
                "whole study, which is reserved already",
            )
        )
    return rows


def _peers(settings: Settings, plan: StudyPlan) -> Rows:
    names = sorted(plan.hospitals or read_roster(settings).identities)
    threshold = max(plan_threshold(plan.minimum_hospitals, len(names)), settings.policy.least_threshold)
    others = ", ".join(name for name in names if name != settings.name)
    whom = "named in the plan" if plan.hospitals else "of the roster"
    return [
        ("peers", f"{others}: those {whom} that take part"),
        ("threshold", f"{threshold} of {len(names)} must stay to the end of a sum, or nothing is opened"),
    ]


def _training(settings: Settings, plan: StudyPlan, task: Task, manifest: Manifest) -> Rows:
    population = Source(task, fold=plan.fold).current(settings)
    training, validation = population.training.patient_count, population.validation.patient_count
    parameters = count_parameters(plan.network, task)
    privacy, fold = plan.privacy, plan.fold
    part = f"fold {fold.index} of {fold.count} of a cross-validation: " if fold else ""
    return [
        ("task", f"{task.name}: {task.description}"),
        ("network", f"{plan.network.name}, {parameters} parameters{_base(plan)}"),
        ("columns", _columns(manifest, task)),
        (
            "patients",
            f"{part}{training} to train with, {validation} to validate with, without those who said no (true counts: "
            "for your eyes only)",
        ),
        (
            "mechanism",
            f"{plan.rounds} rounds, and {privacy.spare_charges} in reserve, of {plan.training.steps} steps; in each "
            f"step every patient takes part with probability {privacy.sample_rate:g}, a patient's gradient is clipped "
            f"to {privacy.clip:g}, and Gaussian noise of {privacy.noise_multiplier:g} times that is added",
        ),
    ]


def _base(plan: StudyPlan) -> str:
    base = base_of(plan.network)
    return (
        f" that are trained, on the pretrained base {base}, of which this hospital's copy was checked" if base else ""
    )


def _columns(manifest: Manifest, task: Task) -> str:
    """The schema's columns, with the file's own names where they differ."""
    schema = (
        [column.name for column in task.input.columns]
        if isinstance(task.input, TableInput)
        else manifest.contents(task)
    )
    labels = label_columns(manifest, task)
    named = {name: manifest.column(name) for name in schema} | labels
    listed = ", ".join(name if name == column else f"{name} (in the file: {column})" for name, column in named.items())
    last = "the last is the label" if len(labels) == 1 else f"the last {len(labels)} are labels"
    patient = f"patient column: {manifest.patient}" if manifest.patient else "every row is a patient"
    return f"{listed}; {last}; {patient}"


def _leaving(policy: Policy, plan: StudyPlan, task: Task) -> Rows:
    length = count_parameters(plan.network, task) + NULL_COORDINATES
    update = f"each round one noised update of {length} numbers, under masks that only a sum takes off"
    always = (
        "the declared public size; signed receipts of what was charged; codes of refusals; when this hospital is up"
    )
    if policy.send_checkpoints:
        always += "; checkpoints of the ledger, for auditors"
    if policy.send_evidence:
        always += "; the ledger itself and what belongs to it, for auditors"
    if plan.evaluation is None:
        return [("what leaves", f"{update}; {always}; no statistics")]
    release = plan.evaluation
    groups = "".join(f", and of each group by {one.column}" for one in release.subgroups)
    statistics = (
        f"every {release.every} rounds validation statistics of {release.bins} bins{groups}, each patient's clipped to "
        f"{release.clip:g}, with noise of {release.noise_multiplier:g} times that, under masks"
    )
    return [("what leaves", f"{update}; {statistics}; {always}")]


def _costs(plan: StudyPlan, budget: Budget, *, again: bool) -> Rows:
    terms, price = budget.terms, budget.price(plan)
    relation = f"per {UNIT}, {NEIGHBOURING}, by a Renyi filter at order {terms.order}"
    return [
        (
            "price",
            f"epsilon {price.study_epsilon_filter:.4f} at delta {plan.privacy.delta:g}, {relation}; "
            f"the plan promises at most {plan.privacy.epsilon:g}",
        ),
        ("budget left", _left(price, budget, again=again)),
    ]


def _left(price: Price, budget: Budget, *, again: bool) -> str:
    """Before and after; the same where the study is reserved already."""
    terms = budget.terms
    now = "now and afterwards" if again else f"afterwards, {price.left_before:.4f} now"
    return (
        f"epsilon {price.left_after:.4f} {now}, of {terms.epsilon:g} at delta "
        f"{terms.delta:g} for population {budget.population}"
    )
