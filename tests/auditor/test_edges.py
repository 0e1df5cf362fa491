"""What the figures rest on: stated from what is recorded, with the entries it was read from."""

from dataclasses import replace

from auditor.edges import Edge, Rests, sharp_edges
from auditor.record import Audit
from auditor.report import anchors_of
from shared_models.plan import EarlyStopping, StudyPlan, read_plan
from tests.auditor.made_up import RELEASE, Writer, hospital, large, training
from tests.test_map import ROOT


def edges(*writers: Writer, plans: dict[str, StudyPlan] | None = None) -> dict[str, Edge]:
    """The edges of made-up ledgers, by topic."""
    records = tuple(hospital(writer.name, writer, plans=plans) for writer in writers)
    return told(replace(large(1, 1), hospitals=records, attempts=(), members={}))


def told(audit: Audit) -> dict[str, Edge]:
    """The edges of an audit, by topic."""
    return {edge.topic: edge for edge in sharp_edges(audit, anchors_of(audit.hospitals))}


def ledger(*studies: str, name: str = "north") -> Writer:
    """A ledger of some studies, one after the other."""
    writer = Writer(name)
    writer.add("budget-opened")
    for study in studies:
        writer.study(study, 3)
    return writer


def test_a_study_after_another_one_makes_tight_figures_no_bound() -> None:
    """The entry that approved the second one is where it shows; with one study, nothing was decided on the way."""
    one, two = edges(ledger("heart")), edges(ledger("heart", "lungs"))

    assert one["Decisions on the way"].severity == "low"
    assert "tight figures hold as well" in one["Decisions on the way"].says
    found = two["Decisions on the way"]
    assert found.severity == "high"
    assert "only the enforced figure is a bound" in found.says
    approvals = [line.seq for line in ledger("heart", "lungs").lines if line.kind == "plan-approved"]
    assert found.rests == (Rests("north", approvals[1]),)


def test_studies_that_were_approved_before_any_result_are_no_decision_on_the_way() -> None:
    """Two approvals, then the charges of both."""
    writer = ledger()
    for study in ("heart", "lungs"):
        approval = ledger(study).lines[1]
        writer.add("plan-approved", study=study, plan_digest="ab" * 32, limit=approval.limit)
    for study in ("heart", "lungs"):
        writer.add("charge", study=study, plan_digest="ab" * 32, round=1, attempt=1, mechanism=training())

    assert edges(writer)["Decisions on the way"].severity == "low"


def test_a_plan_that_may_end_early_depends_on_results() -> None:
    """Early stopping is a decision by released results, even in a first study."""
    plan = read_plan(ROOT / "server" / "plans" / "breast-cancer.toml")
    stopping = plan.model_copy(update={"early_stopping": EarlyStopping(metric="auroc", patience=2)})

    assert edges(ledger("heart"), plans={"heart": plan})["Decisions on the way"].severity == "low"
    found = edges(ledger("heart"), plans={"heart": stopping})["Decisions on the way"]

    assert found.severity == "high"
    assert "the plan of heart lets released results end the study early" in found.says


def test_a_patient_of_two_hospitals_is_covered_by_the_sum_of_the_largest() -> None:
    """By the enforced figures, with both last charges; one hospital alone has no such edge."""
    writers = [ledger("heart", name="north"), ledger("heart", "lungs", name="south"), ledger("heart", name="east")]

    found = edges(*writers)["Patients of two hospitals"]

    records = [hospital(writer.name, writer).budget for writer in (writers[1], writers[2])]
    total = sum(record.spent.epsilon_filter for record in records if record)
    assert f"epsilon {total:.3f}, for a patient of south" in found.says
    assert [rests.anchor for rests in found.rests] == ["south", "east"]
    assert "Patients of two hospitals" not in edges(writers[0])


def test_sampling_is_stated_with_its_rates() -> None:
    """Each different rate once, with an entry; releases, which sample nobody, are said to be priced so."""
    writer = ledger("heart")
    about = {"study": "heart", "plan_digest": "ab" * 32}
    other = training().model_copy(update={"sample_rate": 0.5})
    writer.add("charge", **about, round=4, attempt=1, mechanism=other)
    writer.add("charge", **about, round=4, attempt=1, mechanism=RELEASE)

    found = edges(writer)["How patients were drawn"]

    assert "with probability 0.02, 0.5." in found.says
    assert "Released statistics use every patient" in found.says
    assert [writer.lines[rests.entry - 1].mechanism for rests in found.rests] == [training(), other, RELEASE]
    assert "How patients were drawn" not in edges(ledger())


def test_a_conformance_test_makes_what_is_recorded_more_credible() -> None:
    """Without one, and without coordinates of pure noise, nothing shows that noise was added."""
    writer = ledger("heart")
    bare = edges(writer)["Recorded is not done"]
    writer.add("conformance", digest="ef" * 32)
    tested = edges(writer)

    assert bare.severity == "high"
    assert tested["Recorded is not done"].severity == "medium"
    assert tested["Recorded is not done"].rests == (Rests("north", len(writer.lines)),)
    assert "1 of 1 hospitals recorded a test of it" in tested["How patients were drawn"].says


def test_whoever_is_not_here_is_named() -> None:
    """Members of the roster and whoever was invited; many are counted."""
    audit = large(3, 5)
    some = replace(audit, hospitals=audit.hospitals[:1])
    crowd = replace(audit, members={f"member-{number:03}": "x" for number in range(50)})

    assert "Evidence that is not here" not in told(audit)
    assert "hospital-2, hospital-3. Nothing is said" in told(some)["Evidence that is not here"].says
    assert "and 30 more" in told(crowd)["Evidence that is not here"].says


def test_an_update_of_the_software_is_told() -> None:
    """Two digests in the ledgers, each where it first stands."""
    writer = ledger("heart")
    writer.lines[-2] = writer.lines[-2]._replace(software_digest="01" * 32)

    found = edges(writer)["Software"]

    assert "2 different versions" in found.says
    assert [rests.entry for rests in found.rests] == [2, len(writer.lines) - 1]
    assert "Software" not in edges(ledger("heart"))


def test_edges_are_sorted_and_rest_on_entries() -> None:
    """The sharpest first; each entry that is named exists; of nothing, nothing is said."""
    writer = ledger("heart", "lungs")
    found = list(edges(writer, ledger("heart", name="south")).values())

    ranks = [("high", "medium", "low").index(edge.severity) for edge in found]
    assert ranks == sorted(ranks)
    assert all(1 <= rests.entry <= len(writer.lines) for edge in found for rests in edge.rests)
    assert sharp_edges(Audit((), (), ()), {}) == []
