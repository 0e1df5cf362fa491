"""The installed trainer, tested by its own hospital: an honest one passes, and the result is signed."""

import json
from pathlib import Path

import pytest

from client.cli import app
from client.conformance import CANARIES, FALSE_ALARM, conform
from client.consent import Consents
from client.own_noise import NOISE, Noted, noted_noise
from client.process import announced
from shared_models.encoding import NULL_COORDINATES
from shared_models.errors import AlreadyRunningError, ConfigError, PendingError
from shared_models.plan import StudyPlan, read_plan
from shared_models.privacy.conformance import Conformance
from shared_models.privacy.entries import Entry, canonical_json, parse_entry
from tests.federation import Federation, changed, make_federation, restart_hospitals

PLANS = Path(__file__).parents[2] / "server" / "plans"
PLAN = read_plan(PLANS / "breast-cancer.toml")
PUBLIC_SIZE = 140
OTHERS = (
    read_plan(PLANS / "heart-disease.toml"),
    changed(PLAN, privacy={"sample_rate": 0.02, "noise_multiplier": 0.7, "clip": 3.0}, training={"steps": 40}),
    changed(PLAN, privacy={"sample_rate": 1.0, "noise_multiplier": 100.0}, training={"steps": 1}, rounds=1),
    changed(PLAN, network={"name": "mlp", "hidden": [8]}, training={"proximal": 0.1, "steps": 3}),
)


def run(*arguments: str) -> None:
    """The command, as its user types it."""
    app(["conformance", *arguments], standalone_mode=False)


@pytest.mark.parametrize("plan", OTHERS, ids=["heart", "little-noise", "everybody", "proximal-mlp"])
def test_an_honest_trainer_conforms_to_any_plan(plan: StudyPlan) -> None:
    """Small rates, sample rate 1, one round, much or little noise. A false alarm has probability 1e-6."""
    found = conform(plan, PUBLIC_SIZE)

    assert [check.name for check in found.checks if check.verdict != "holds"] == []
    assert found.false_alarm == FALSE_ALARM
    assert found.canaries.canaries == CANARIES
    assert found.canaries.epsilon_lower <= found.canaries.epsilon_most


def honest_runs(times: int) -> list[str]:
    """Names of checks that did not hold, over so many honest runs of the default study."""
    found = [conform(PLAN, PUBLIC_SIZE) for _ in range(times)]
    return [check.name for result in found for check in result.checks if check.verdict != "holds"]


def test_ten_honest_runs_raise_no_alarm() -> None:
    """The probability of any, over all ten, is below 1e-5."""
    assert honest_runs(10) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_honest_runs_raise_no_alarm() -> None:
    """The probability of any, over all hundred, is below 1e-4."""
    assert honest_runs(100) == []


def test_the_audit_has_power_and_says_how_much() -> None:
    """With little noise the bound comes near what is claimed; it would go far beyond it before it ends."""
    found = conform(OTHERS[1], PUBLIC_SIZE).canaries

    assert 0.1 * found.epsilon_claimed < found.epsilon_expected < found.epsilon_claimed
    assert found.epsilon_expected / 2 < found.epsilon_lower < found.epsilon_claimed
    assert found.guesses <= found.canaries


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Hospitals whose ledgers have been opened."""
    found = make_federation(tmp_path_factory.mktemp("conformance"), hospitals=3, rounds=1)
    found.run()
    restart_hospitals()
    return found


def test_the_result_is_signed_into_the_ledger(federation: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    """One entry, with study, plan and software; the budget is what it was."""
    settings, plan = federation.settings_file("hospital-1"), federation.folder / "study.toml"
    before = federation.ledger("hospital-1")

    run(str(settings), "--plan", str(plan), "--json")

    said = json.loads(capsys.readouterr().out)
    *kept, entry = federation.ledger("hospital-1")
    assert kept == before
    assert (entry.kind, entry.seq, entry.study) == ("conformance", said["entry"], federation.plan.study)
    assert entry.plan_digest == federation.plan.digest()
    assert entry.software_digest == before[1].software_digest
    assert entry.mechanism is None
    assert entry.conformance is not None
    assert entry.conformance.holds
    assert entry.conformance.model_dump(mode="json").items() <= said.items()
    assert parse_entry(entry.canonical, bytes.fromhex(entry.signature)) == entry


def test_the_noise_of_real_rounds_is_tested_with_the_rest(federation: Federation, tmp_path: Path) -> None:
    """Every trained round left a line; lines of half the noise fail the command, and those of other plans do not."""
    state, digest = federation.settings("hospital-3").state, federation.plan.digest()
    noted = noted_noise(state, digest)

    honest, wrong = (
        {check.name: check.verdict for check in conform(PLAN, PUBLIC_SIZE, noted=found).checks}
        for found in (noted, noted._replace(statistic=noted.statistic / 4))
    )

    assert noted.coordinates == NULL_COORDINATES
    assert honest["real-rounds-noise"] == "holds"
    assert wrong["real-rounds-noise"] == "failed"
    assert noted_noise(state, "0" * 64).coordinates == 0
    assert "real-rounds-noise" not in {check.name for check in conform(PLAN, PUBLIC_SIZE, noted=Noted(0, 0)).checks}


def test_a_round_whose_noise_cannot_be_noted_is_answered_all_the_same(tmp_path: Path) -> None:
    """A folder is in the file's place: the log says so, and nobody else notices."""
    federation = make_federation(tmp_path, hospitals=3, rounds=1)
    (federation.settings("hospital-1").state / NOISE).mkdir(parents=True)

    federation.run()
    restart_hospitals()

    assert len(federation.charges("hospital-1")) == 1
    assert federation.events("sum")[0]["answered"] == federation.names


def test_while_the_daemon_runs_nothing_is_recorded(federation: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger has one writer: the command says so at once, and a dry run shows the result all the same."""
    settings, plan = federation.settings_file("hospital-2"), str(federation.folder / "study.toml")
    before = federation.ledger("hospital-2")

    with announced(federation.settings("hospital-2").state):
        with pytest.raises(AlreadyRunningError):
            run(str(settings), "--plan", plan)
        run(str(settings), "--plan", plan, "--dry-run")

    assert "not recorded" in capsys.readouterr().out
    assert federation.ledger("hospital-2") == before


@pytest.mark.parametrize("arguments", [[], ["unheard-of"], ["study", "--plan", "plan.toml"]])
def test_a_study_or_a_plan_is_needed(federation: Federation, arguments: list[str]) -> None:
    """One of the two, and one that is there."""
    with pytest.raises(ConfigError):
        run(str(federation.settings_file("hospital-3")), *arguments)


def test_the_plan_of_a_study_that_waits_is_found(federation: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a steward can test the trainer before the approval."""
    settings, later = federation.settings("hospital-3"), changed(federation.plan, study="later")
    with pytest.raises(PendingError):
        Consents(settings.state).of(later, bytes(32), software="0" * 64, stands=False)

    run(str(federation.settings_file("hospital-3")), "later", "--dry-run")

    assert "later: 2 rounds of 8 steps, rehearsed" in capsys.readouterr().out


def test_an_entry_without_a_result_is_what_it_was() -> None:
    """As 0.1.0 wrote entries, to the bit: a field that is not used is not there."""
    fields = {"seq": 2, "previous_hash": "a" * 64, "time": "2026-11-26T00:00:00.000Z", "hospital": "north"}
    body = canonical_json(fields | {"kind": "conformance"})

    entry = parse_entry(body, bytes(64))

    assert entry.canonical == body
    assert "conformance" not in entry.model_dump(exclude_none=True)
    assert set(Entry.model_fields) >= {"conformance"}


def test_a_result_that_does_not_hold_says_so() -> None:
    """One check is enough."""
    found = conform(OTHERS[2], PUBLIC_SIZE)
    first, *rest = found.checks

    worse = found.model_copy(update={"checks": (first.model_copy(update={"verdict": "warning"}), *rest)})

    assert found.holds
    assert not worse.holds
    assert Conformance.model_validate_json(worse.model_dump_json()) == worse
