"""Privacy bugs in a hospital of a whole federation: each is found within one study from the evidence, and named."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from auditor.audit import audit
from auditor.cli import app
from client import budget, dp_sgd
from client.anchor import Anchors
from client.books import LEDGER
from client.budget import Budget
from client.bundle import export
from client.randomness import SecureRandom
from client.round import Hospital
from shared_models.encoding import NULL_COORDINATES
from shared_models.errors import ConformanceError
from shared_models.identity import read_public
from shared_models.privacy.entries import canonical_json
from shared_models.privacy.ledger import Entry, Ledger
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian, study_mechanisms
from tests.federation import Federation, make_federation, restart_hospitals

LIAR = "hospital-1"
ROUNDS = 6

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def nobody_stays_open() -> Iterator[None]:
    """Hospitals of one test are gone before the next."""
    yield
    restart_hospitals()


def at_the_liar(patch: Patch, plant: Callable[[Patch], None], station: str = "train") -> None:
    """Plant a bug in the code of one hospital of four: in force at one station of its rounds, and nowhere else."""
    right = getattr(Hospital, station)

    def planted(self: Hospital, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if self.settings.name == LIAR:
                plant(inner)
            return right(self, *arguments)

    patch.setattr(Hospital, station, planted)


def study(folder: Path, *, rounds: int = ROUNDS) -> tuple[Federation, list[str]]:
    """Run a study. Returns the federation, and what an auditor is given: bundles, folder, plan."""
    federation = make_federation(folder, hospitals=4, rounds=rounds, training={"steps": 2})
    sums = federation.run()
    restart_hospitals()
    bundles = []
    for name in federation.names:
        bundles.append(str(folder / f"{name}.evidence"))
        export(federation.settings(name), Path(bundles[-1]))
    return federation, [*bundles, "--study", str(sums), "--plan", str(folder / "study.toml")]


def attack(evidence: list[str], found: Path) -> None:
    """The auditor's command."""
    app(["attack", *evidence, "--json", str(found)], standalone_mode=False)


# Noise: found in the decoded sums


def without_noise(patch: Patch) -> None:
    right = SecureRandom.gaussian
    patch.setattr(SecureRandom, "gaussian", lambda self, n: 0 * right(self, n))


def half_the_noise(patch: Patch) -> None:
    right = dp_sgd.local_steps
    patch.setattr(
        dp_sgd, "local_steps", lambda *a, noise_multiplier, **k: right(*a, noise_multiplier=noise_multiplier / 2, **k)
    )


def noise_divided_twice(patch: Patch) -> None:
    right = SecureRandom.gaussian
    patch.setattr(SecureRandom, "gaussian", lambda self, n: right(self, n) / 70)  # the expected batch


def a_repeated_seed(patch: Patch) -> None:
    right = SecureRandom.__init__
    patch.setattr(SecureRandom, "__init__", lambda self, _key: right(self, bytes(range(32))))


IN_THE_SUMS = {
    without_noise: "noise-too-small",
    half_the_noise: "noise-too-small",
    noise_divided_twice: "noise-too-small",
    a_repeated_seed: "noise-repeated",
}


def test_an_honest_study_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole path from noise at hospitals to integers, masks, a sum and its coordinates: a ratio of 1."""
    _, evidence = study(tmp_path)

    attack(evidence, tmp_path / "found.json")

    (report,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["noise"]
    assert report["findings"] == []
    assert report["attempts"] == ROUNDS
    assert abs(report["ratio"] - 1) < 5 / (2 * ROUNDS * NULL_COORDINATES) ** 0.5
    assert f"of the charged standard deviation in {ROUNDS} sums" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_honest_studies_raise_no_alarm(tmp_path: Path) -> None:
    """Neither the noise in their sums nor their evidence; the probability of any alarm of noise is below 1e-4."""
    for number in range(100):
        federation, evidence = study(tmp_path / str(number), rounds=3)
        attack(evidence, tmp_path / "found.json")
        assert problems(federation, evidence) == []


@pytest.mark.parametrize(("plant", "code"), IN_THE_SUMS.items(), ids=lambda it: getattr(it, "__name__", it))
def test_a_bug_at_one_of_four_hospitals_is_found_in_the_sums(
    plant: Callable[[Patch], None], code: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Although the coordinator sees sums only, and three quarters of their noise are right."""
    at_the_liar(monkeypatch, plant)
    _, evidence = study(tmp_path)

    with pytest.raises(ConformanceError, match="the attack succeeded"):
        attack(evidence, tmp_path / "found.json")

    (report,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["noise"]
    assert [finding["code"] for finding in report["findings"]] == [code]


# The ledger: found by comparing


def problems(federation: Federation, evidence: list[str]) -> list[tuple[str, str]]:
    """Whom and what the auditor names, given bundles, the coordinator's folder and the root key."""
    sources = [*(Path(path) for path in evidence if path.endswith(".evidence")), federation.folder / "study"]
    found = audit(sources, root=read_public(federation.settings(LIAR).keys.root)).findings
    return [(finding.party, finding.code) for finding in found if finding.severity != "note"]


def test_a_wrong_sample_rate_in_the_ledger_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """Half of it, from the approval on, so that the study seems to cost half; receipts say what the plan does."""
    planned, charge = study_mechanisms, Budget.charge

    def halved(mechanism: PoissonGaussian | GaussianRelease) -> PoissonGaussian:
        assert isinstance(mechanism, PoissonGaussian)
        return mechanism.model_copy(update={"sample_rate": mechanism.sample_rate / 2})

    def approve(patch: Patch) -> None:
        patch.setattr(budget, "study_mechanisms", lambda plan, size: [halved(m) for m in planned(plan, size)])

    def pay(patch: Patch) -> None:
        def cheaply(self: Budget, *a: Any, mechanism: PoissonGaussian, **k: Any) -> Entry:
            return charge(self, *a, mechanism=halved(mechanism), **k).model_copy(update={"mechanism": mechanism})

        patch.setattr(Budget, "charge", cheaply)

    at_the_liar(monkeypatch, approve, "enrol")
    at_the_liar(monkeypatch, pay)
    federation, evidence = study(tmp_path)

    named = problems(federation, evidence)
    assert (LIAR, "price-differs") in named
    assert (LIAR, "receipt-differs") in named


def test_a_charge_that_was_skipped_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """The receipt is for an entry that was signed and never written, and the hospital looks away."""

    def skip(patch: Patch) -> None:
        right = Ledger.append

        def skipping(self: Ledger, kind: Any, **fields: Any) -> Entry:
            if kind == "charge" and fields["round"] == 5:
                return self._sign(kind, fields)
            return right(self, kind, **fields)

        patch.setattr(Ledger, "append", skipping)

    at_the_liar(monkeypatch, skip)
    monkeypatch.setattr(Anchors, "check", lambda *_, **__: None)
    federation, evidence = study(tmp_path)

    assert (LIAR, 5) not in [(LIAR, number) for number, _ in federation.charges(LIAR)]
    assert (LIAR, "rolled-back") in problems(federation, evidence)


def test_an_approval_that_was_altered_is_found(tmp_path: Path) -> None:
    """A larger limit, written over the approved one once the study is over."""
    federation, _ = study(tmp_path)
    path = federation.settings(LIAR).state / LEDGER
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TRIGGER no_update")
        (body,) = database.execute("SELECT body FROM entries WHERE seq = 2").fetchone()
        fields = json.loads(body)
        assert fields["kind"] == "plan-approved"
        fields["limit"]["epsilon"] *= 10
        database.execute("UPDATE entries SET body = ? WHERE seq = 2", (canonical_json(fields),))
        database.commit()

    (found,) = [finding for finding in audit([path]).findings if finding.severity != "note"]
    assert found.code == "ledger-broken"
    assert "ledger entry 2" in found.what
