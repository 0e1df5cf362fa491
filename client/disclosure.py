"""What a steward reads before deciding on a study: who, what, from which columns, what leaves, and what it costs.

True counts are for the steward's own eyes. Nothing of this leaves the hospital.
"""

import hashlib
import json

from client.budget import Budget, Price
from client.membership import read_roster
from client.policy import Policy
from client.records.labels import label_columns
from client.records.manifest import Manifest, read_manifest
from client.records.population import Source
from client.settings import Settings
from client.words import Said, Words, said, words
from shared_models.encoding import NULL_COORDINATES
from shared_models.nets.build import count_parameters
from shared_models.plan import StudyPlan
from shared_models.pretrained import base_of
from shared_models.privacy.entries import Entry
from shared_models.secagg.protocol import plan_threshold
from shared_models.software import software_digest
from shared_models.tasks import TableInput, Task, task_of
from shared_models.terminal import printable
from shared_models.versions import RELEASE

Facts = list[tuple[str, Said]]
Rows = list[tuple[str, str]]


def disclose(settings: Settings, plan: StudyPlan, budget: Budget, *, before: Entry | None = None) -> Facts:
    """All of it, as pairs of a heading's key and a sentence; reads the records to count patients.

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
        *named_only(plan),
        ("coordinator", said("fact.coordinator", address=settings.coordinator)),
        *_software(plan, budget, before),
        *_peers(settings, plan),
        *_training(settings, plan, task, manifest),
        *_leaving(settings.policy, plan, task),
        *_costs(plan, budget, again=before is not None),
    ]


def named_only(plan: StudyPlan) -> Facts:
    """What a plan says of itself, where nothing more can be said."""
    return [
        ("study", said("fact.study", study=plan.study, digest=plan.digest())),
        ("purpose", said("verbatim", text=printable(plan.purpose))),
        ("licence", said("verbatim", text=printable(plan.data_licence))),
    ]


def in_words(facts: Facts, language: Words | None = None) -> Rows:
    """The facts in a language, English unless told otherwise: pairs of a heading and a text."""
    language = language or words()
    return [(language(f"heading.{heading}"), language.say(fact)) for heading, fact in facts]


def facts_digest(facts: Facts) -> str:
    """SHA-256 over all that was shown, in whatever language: for whether it is still so when the answer comes."""
    return hashlib.sha256(json.dumps(in_words(facts)).encode()).hexdigest()


def _software(plan: StudyPlan, budget: Budget, before: Entry | None) -> Facts:
    facts = [("software", said("fact.software", release=RELEASE, digest=software_digest()))]
    if before is not None:
        made, reserved = budget.charges(plan.study)
        old = before.software_digest
        was = said("fact.software-known", digest=old[:12]) if old else said("fact.software-unknown")
        again = said("fact.again", software=was, day=before.time[:10], made=made, reserved=reserved)
        facts.append(("again", again))
    return facts


def _peers(settings: Settings, plan: StudyPlan) -> Facts:
    names = sorted(plan.hospitals or read_roster(settings).identities)
    threshold = max(plan_threshold(plan.minimum_hospitals, len(names)), settings.policy.least_threshold)
    others = [name for name in names if name != settings.name]
    return [
        ("peers", said("fact.peers-plan" if plan.hospitals else "fact.peers-roster", names=others)),
        ("threshold", said("fact.threshold", threshold=threshold, hospitals=len(names))),
    ]


def _training(settings: Settings, plan: StudyPlan, task: Task, manifest: Manifest) -> Facts:
    population = Source(task, fold=plan.fold).current(settings)
    counts = {"training": population.training.patient_count, "validation": population.validation.patient_count}
    privacy, fold, base = plan.privacy, plan.fold, base_of(plan.network)
    network = {"name": plan.network.name, "parameters": count_parameters(plan.network, task)}
    return [
        ("task", said("fact.task", name=task.name, description=task.description)),
        ("network", said("fact.network-base", base=base, **network) if base else said("fact.network", **network)),
        ("columns", _columns(manifest, task)),
        (
            "patients",
            said("fact.patients-fold", index=fold.index, count=fold.count, **counts)
            if fold
            else said("fact.patients", **counts),
        ),
        (
            "mechanism",
            said(
                "fact.mechanism",
                rounds=plan.rounds,
                spare=privacy.spare_charges,
                steps=plan.training.steps,
                rate=privacy.sample_rate,
                clip=privacy.clip,
                noise=privacy.noise_multiplier,
            ),
        ),
    ]


def _columns(manifest: Manifest, task: Task) -> Said:
    """The schema's columns, with the file's own names where they differ."""
    schema = (
        [column.name for column in task.input.columns]
        if isinstance(task.input, TableInput)
        else manifest.contents(task)
    )
    labels = label_columns(manifest, task)
    groups = {group.name: column for group in task.groups if (column := manifest.groups.get(group.name))}
    named = {name: manifest.column(name) for name in schema} | groups | labels
    listed = [
        name if name == column else said("fact.column", name=name, column=column) for name, column in named.items()
    ]
    last = said("fact.label") if len(labels) == 1 else said("fact.labels", count=len(labels))
    patient = said("fact.patient-column", column=manifest.patient) if manifest.patient else said("fact.rows-patients")
    return said("fact.columns", columns=listed, last=last, patient=patient)


def _leaving(policy: Policy, plan: StudyPlan, task: Task) -> Facts:
    leaves = {
        "update": said("fact.update", length=count_parameters(plan.network, task) + NULL_COORDINATES),
        "always": said("fact.always"),
        "checkpoints": said("fact.checkpoints") if policy.send_checkpoints else "",
        "evidence": said("fact.evidence") if policy.send_evidence else "",
    }
    release = plan.evaluation
    if release is None:
        return [("leaves", said("fact.leaves", **leaves))]
    statistics = said(
        "fact.statistics",
        every=release.every,
        bins=release.bins,
        groups=said("fact.groups", columns=[one.column for one in release.subgroups]) if release.subgroups else "",
        clip=release.clip,
        noise=release.noise_multiplier,
    )
    return [("leaves", said("fact.leaves-statistics", statistics=statistics, **leaves))]


def _costs(plan: StudyPlan, budget: Budget, *, again: bool) -> Facts:
    terms, price = budget.terms, budget.price(plan)
    return [
        (
            "price",
            said(
                "fact.price",
                epsilon=price.study_epsilon_filter,
                delta=plan.privacy.delta,
                relation=said("fact.relation"),
                order=terms.order,
                promised=plan.privacy.epsilon,
            ),
        ),
        ("left", _left(price, budget, again=again)),
    ]


def _left(price: Price, budget: Budget, *, again: bool) -> Said:
    """Before and after; the same where the study is reserved already."""
    terms = budget.terms
    of = {"epsilon": terms.epsilon, "delta": terms.delta, "population": budget.population}
    if again:
        return said("fact.left-again", after=price.left_after, **of)
    return said("fact.left", after=price.left_after, before=price.left_before, **of)
