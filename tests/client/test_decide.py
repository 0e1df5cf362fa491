"""The steward's commands: what they show, and that a price stands on it."""

import csv
import json

import pytest

from client.books import read_budget
from client.consent import Consents
from client.records.manifest import read_manifest
from client.records.population import Source
from shared_models.errors import ConfigError, FederationError
from shared_models.tasks import TableInput, find_task
from tests.client.test_cli import run
from tests.federation import Federation, change_policy, make_federation, restart_hospitals
from tests.rounds.test_a_server_that_lies import Coordinator
from tests.rounds.test_a_study_that_waits import approve

HOSPITAL = "hospital-1"


@pytest.fixture
def waiting(federation: Federation) -> Federation:
    """A federation whose study waits at one hospital."""
    change_policy(federation, HOSPITAL, standing_approvals=[])
    Coordinator(federation).propose(HOSPITAL)
    return federation


def shown(federation: Federation) -> str:
    """What ``approve`` shows, on one line; the question is answered with no."""
    from typer.testing import CliRunner

    from client.cli import app

    arguments = ["approve", str(federation.settings_file(HOSPITAL)), federation.plan.study]
    return " ".join(CliRunner().invoke(app, arguments, input="n\n").output.split())


def test_approve_shows_all_that_a_steward_needs_to_decide(waiting: Federation) -> None:
    """Who, what for, with whom, from which columns, how many patients, what leaves, which plan, and at what price."""
    text, plan = shown(waiting), waiting.plan
    settings = waiting.settings(HOSPITAL)
    budget = read_budget(settings)
    price = budget.price(plan)
    task = find_task(plan.task)
    assert isinstance(task.input, TableInput)

    for part in (
        plan.purpose.strip(),
        "127.0.0.1:9443, as its TLS certificate proves",
        "hospital-2, hospital-3, hospital-4",
        "3 of 4 must stay",
        "logistic-regression, 31 parameters",
        *(column.name for column in task.input.columns),
        "diagnosis; the last is the label",
        f"noise of {plan.privacy.noise_multiplier:g} times",
        f"epsilon {price.study_epsilon_filter:.4f} at delta {plan.privacy.delta:g}, per patient, add or remove one",
        f"Renyi filter at order {settings.population.order}",
        f"epsilon {price.left_after:.4f} afterwards, {price.left_before:.4f} now",
        "1055 numbers, under masks",
        "no statistics",
        plan.digest(),
    ):
        assert part in text.replace("- ", "-"), part


def test_the_patients_it_counts_are_those_of_the_records(waiting: Federation) -> None:
    """True counts, for the steward's own terminal; they are nowhere in what is kept."""
    settings = waiting.settings(HOSPITAL)
    rows = len((settings.records / "data.csv").read_text(encoding="utf-8").splitlines()) - 1

    assert f"{rows} to train with, 0 to validate with" in shown(waiting)
    approve(waiting, HOSPITAL)
    for path in (settings.state / "studies").iterdir():
        assert rows not in numbers(json.loads(path.read_text(encoding="utf-8")))


def numbers(kept: object) -> list[float]:
    """Every number in a JSON value, however deep; a digest or a time is text, and may hold any digits."""
    match kept:
        case dict():
            return [number for value in kept.values() for number in numbers(value)]
        case list():
            return [number for value in kept for number in numbers(value)]
        case bool() | str() | None:
            return []
        case int() | float():
            return [kept]
    raise AssertionError(kept)


def test_who_said_no_is_not_counted(waiting: Federation) -> None:
    """The steward decides about the patients that would really be used."""
    settings, file = waiting.settings(HOSPITAL), waiting.settings_file(HOSPITAL)
    manifest = read_manifest(settings.records)
    with manifest.file.open(encoding="utf-8", newline="") as stream:
        patients = [row[manifest.patient or ""] for row in csv.DictReader(stream)]
    file.write_text('opt_out = "no.txt"\n' + file.read_text(encoding="utf-8"), encoding="utf-8")
    (file.parent / "no.txt").write_text("\n".join(patients[:2]), encoding="utf-8")

    assert f"{len(set(patients)) - 2} to train with" in shown(waiting)


def test_subgroups_and_a_fold_are_shown_with_the_fold_s_own_patients(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By what patients are told apart, and who trains in this fold: not the part that the manifest keeps."""
    evaluation = {
        "every": 2,
        "clip": 1.0,
        "noise_multiplier": 40.0,
        "subgroups": [{"column": "mean_radius", "edges": [14.0]}],
    }
    federation = make_federation(
        tmp_path_factory.mktemp("fold"),
        rounds=2,
        privacy={"noise_multiplier": 40.0},
        evaluation=evaluation,
        fold={"index": 2, "count": 4},
    )
    change_policy(federation, HOSPITAL, standing_approvals=[])
    Coordinator(federation).propose(HOSPITAL)
    settings, plan = federation.settings(HOSPITAL), federation.plan

    text = shown(federation)

    population = Source(find_task(plan.task), fold=plan.fold).current(settings)
    training, validation = population.training.patient_count, population.validation.patient_count
    assert min(training, validation) > 0
    assert f"fold 2 of 4 of a cross-validation: {training} to train with, {validation} to validate with" in text
    assert "and of each group by mean_radius" in text


def test_a_release_of_statistics_is_shown(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What leaves besides updates is what a steward would miss most."""
    evaluation = {"every": 2, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}
    folder = tmp_path_factory.mktemp("releasing")
    federation = make_federation(folder, rounds=2, privacy={"noise_multiplier": 40.0}, evaluation=evaluation)
    change_policy(federation, HOSPITAL, standing_approvals=[])
    Coordinator(federation).propose(HOSPITAL)

    text = shown(federation)

    assert "every 2 rounds validation statistics of 20 bins" in text
    assert "no statistics" not in text


def test_the_price_that_was_shown_is_the_price_that_is_signed(waiting: Federation) -> None:
    """And what the budget has left afterwards is what the approval said."""
    settings = waiting.settings(HOSPITAL)
    price = read_budget(settings).price(waiting.plan)

    approve(waiting, HOSPITAL)

    approval = Consents(settings.state).approved(waiting.plan.study)
    assert approval is not None
    assert approval.price.epsilon == price.study_epsilon_filter
    Coordinator(waiting).propose(HOSPITAL)
    assert read_budget(settings).left() == pytest.approx(approval.price.left_after)


def test_what_policy_forbids_by_now_cannot_be_approved(waiting: Federation) -> None:
    """The stricter of what the steward says today and what the policy says wins."""
    change_policy(waiting, HOSPITAL, maximum_epsilon_per_study=0.01)

    with pytest.raises(FederationError, match=r"maximum_epsilon_per_study: 1 > 0\.01"):
        run("approve", waiting.settings_file(HOSPITAL), waiting.plan.study)


def test_what_never_came_cannot_be_approved(waiting: Federation) -> None:
    """A name with a typo is no study."""
    with pytest.raises(ConfigError, match="no study another-study waits here"):
        run("approve", waiting.settings_file(HOSPITAL), "another-study")


def test_a_study_that_cannot_be_shown_can_still_be_refused(waiting: Federation) -> None:
    """To say no, neither the records nor the policy have to fit."""
    settings = waiting.settings(HOSPITAL)
    (settings.records / "manifest.toml").unlink()

    said = run("refuse", waiting.settings_file(HOSPITAL), waiting.plan.study, "--yes").output

    assert "not shown" in said
    assert "is refused; its name is used up here" in said


def test_studies_lists_every_state_that_a_study_can_be_in(waiting: Federation) -> None:
    """Pending, approved, closed, refused; while the daemon holds the lock on the ledger, and after it."""
    settings = waiting.settings_file(HOSPITAL)

    def states() -> list[tuple[str, str, str]]:
        found = json.loads(run("studies", settings, "--json").output)
        return [(study["study"], study["status"], study["by"]) for study in found]

    name = waiting.plan.study
    assert states() == [(name, "pending", "the steward")]
    approve(waiting, HOSPITAL)
    assert states() == [(name, "pending", "the coordinator, to propose it again")]
    waiting.run()
    assert states() == [(name, "closed", "steward")]
    waiting.plan = waiting.plan.model_copy(update={"study": "a-second-one"})
    Coordinator(waiting).propose(HOSPITAL)
    run("refuse", settings, "a-second-one", "--yes")
    waiting.plan = waiting.plan.model_copy(update={"study": "a-third-one"})
    change_policy(waiting, HOSPITAL, standing_approvals=[{"maximum_epsilon": 1.0}])
    Coordinator(waiting).propose(HOSPITAL)
    restart_hospitals()

    assert states() == [
        (name, "closed", "steward"),
        ("a-third-one", "approved", "standing-rule"),
        ("a-second-one", "refused", "steward"),
    ]
    assert "a-third-one" in run("studies", settings).output


def test_studies_of_a_hospital_that_was_asked_nothing(federation: Federation) -> None:
    """A sentence, not an empty table; without a ledger, the reason."""
    with pytest.raises(FederationError, match="there is no ledger"):
        run("studies", federation.settings_file(HOSPITAL))
