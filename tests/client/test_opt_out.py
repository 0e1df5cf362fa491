"""The list of patients who say no: what it means, and that a list which cannot be understood stops everything."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.dp_sgd import train
from client.evaluate import released_statistics
from client.records.manifest import read_manifest
from client.records.opt_out import read_opt_outs
from client.records.population import opted_out
from client.records.records import Records
from client.records.tabular import checked_table, split_table
from shared_models.errors import ConfigError, RecordsError
from shared_models.nets.build import build_network
from shared_models.plan import EvaluationPlan, LogisticRegression, PrivacyPlan, TrainingPlan
from tests.client.made_up import repeatable, table, task_of
from tests.client.test_cli import run
from tests.client.test_records import KEY, TASK, write
from tests.federation import Federation

ROWS = ["id,age,stage,outcome", "A-1,0,1,well", "a2,50,2,ill", "A-1,100,3,ill", "007,20,1,well"]


def listed(folder: Path, text: str | bytes) -> Path:
    """Write a list."""
    path = folder / "opt-out.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def left(folder: Path, path: Path) -> Records:
    """What remains of the small records for training."""
    manifest = read_manifest(folder)
    checked = checked_table(manifest, TASK)
    out = opted_out(checked, manifest, read_opt_outs(path), listed=True)
    return split_table(checked, manifest, TASK, split_key=KEY, opted_out=out)[0]


# the file


def test_ids_stand_on_lines_of_their_own_beside_comments_and_blank_lines(tmp_path: Path) -> None:
    """Windows line ends, a byte order mark, a missing last line end and repeated ids change nothing."""
    path = listed(tmp_path, b"\xef\xbb\xbf# who said no\r\nx1\r\n\r\n  x2\r\n#x3\r\nx1\r\nx 4")

    assert read_opt_outs(path) == {"x1", "x2", "x4"}


def test_without_the_setting_nobody_said_no_and_an_empty_list_says_the_same(tmp_path: Path) -> None:
    """A list may wait for its first patient."""
    assert read_opt_outs(None) == read_opt_outs(listed(tmp_path, "# nobody yet\n")) == frozenset()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"secret-id # moved away", "line 2 .* has a comment behind the id"),
        (b'"secret-id"', "line 2 .* has a quotation mark or a separator around the id"),
        (b"secret-id,", "line 2 .* has a quotation mark or a separator around the id"),
        (b"secret-id;2024", None),
        (b"secret\x00id", "line 2 .* holds a character that cannot be printed"),
        (b"secret\tid", "line 2 .* holds a character that cannot be printed"),
        ("secret-id".encode("utf-16"), "is not UTF-8 text"),
        (b"secret-id\xff", "is not UTF-8 text"),
    ],
)
def test_a_malformed_list_is_refused_without_quoting_it(tmp_path: Path, line: bytes, problem: str | None) -> None:
    """What would silently match nobody is an error that names file, line and cause, and no id."""
    path = listed(tmp_path, b"fine\n" + line + b"\n")
    if problem is None:  # an id may hold a separator
        assert len(read_opt_outs(path)) == 2
        return

    with pytest.raises(ConfigError, match=problem) as caught:
        read_opt_outs(path)

    assert "secret" not in f"{caught.value} {caught.value.hint}"
    assert str(path) in str(caught.value)


def test_a_list_that_is_gone_is_not_an_empty_one(tmp_path: Path) -> None:
    """Fail closed: also where a folder stands in its place."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_opt_outs(tmp_path / "opt-out.txt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_opt_outs(tmp_path)


# the records


@pytest.mark.parametrize(
    ("text", "ages"),
    [
        ("A-1", [0, -1.2]),  # all rows of a patient
        ("a-1\nA2", [-1.2]),  # case is no difference
        (" 7 ", [-2, 0, 2]),  # nor are leading zeros of a number, nor spaces
        ("A1", [-2, 0, 2, -1.2]),  # other characters are
        ("nobody-here", [-2, 0, 2, -1.2]),
    ],
)
def test_all_rows_of_a_listed_patient_are_left_out(tmp_path: Path, text: str, ages: list[float]) -> None:
    """However the id is spelled; an id that is not in the records is fine."""
    records = left(write(tmp_path, ROWS), listed(tmp_path, text))

    np.testing.assert_allclose(records.inputs[:][:, 0].numpy(), ages, rtol=1e-6)
    assert records.patient_count == len(set(records.patients.tolist()))


def test_saying_no_never_makes_the_records_unfit(tmp_path: Path) -> None:
    """The only ill patients leave: a refusal now would tell the coordinator that somebody did."""
    assert set(left(write(tmp_path, ROWS), listed(tmp_path, "a-1\na2")).targets[:].tolist()) == {0}


def test_records_without_patient_ids_cannot_be_held_against_a_list(tmp_path: Path) -> None:
    """Otherwise the list would be ignored; also while it is still empty, and where ids look like comments."""
    rows = ["age,stage,outcome", "0,1,well", "50,2,ill"]
    with pytest.raises(RecordsError, match="no patient column to hold it against"):
        left(write(tmp_path, rows, patient=None, one_row_per_patient=True), listed(tmp_path, ""))
    with pytest.raises(RecordsError, match="begin with #"):
        left(write(tmp_path, [*ROWS, "#5,1,1,well"]), listed(tmp_path, ""))


def test_check_data_counts_listed_ids_and_those_that_match(federation: Federation) -> None:
    """So that the steward sees a typo; the two parts are what is left."""
    settings = federation.settings_file("hospital-1")
    data = federation.example.hospitals[0].folder / "data.csv"
    rows = data.read_text(encoding="utf-8").splitlines()
    listed(settings.parent, f"{rows[1].split(',')[0]}\nno-such-patient\n")
    settings.write_text('opt_out = "opt-out.txt"\n' + settings.read_text(encoding="utf-8"), encoding="utf-8")

    said = run("check-data", settings).output

    assert "opt-out list: 2 ids, 1 of them in these records" in said
    assert f"training: {len(rows) - 2} records of {len(rows) - 2} patients" in said


# nobody is left


def nobody(folder: Path) -> Records:
    """The small records when everybody said no."""
    return left(write(folder, ROWS), listed(folder, "a-1\na2\n7"))


def test_without_any_patient_a_step_is_noise_of_the_same_size(tmp_path: Path) -> None:
    """Every step is taken, every coordinate gets its noise, nothing fails: nobody can tell from outside."""
    records = nobody(tmp_path)
    task = TASK
    model = build_network(LogisticRegression(name="logistic-regression"), task, seed=0)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    null = np.zeros(4000)

    report = train(
        model,
        records,
        task,
        training=TrainingPlan(learning_rate=0.5, steps=4),
        privacy=PrivacyPlan(clip=2.0, noise_multiplier=3.0, sample_rate=0.5, epsilon=1.0, delta=1e-5),
        expected_batch=10.0,
        random=repeatable(),
        null=null,
        allow_test_random=True,
    )

    assert (records.patient_count, len(records)) == (0, 0)
    assert (report.steps, report.drawn) == (4, 0)
    assert (torch.nn.utils.parameters_to_vector(model.parameters()) != before).all()
    expected = 0.5 * 3.0 * 2.0 / 10.0 * 4**0.5
    np.testing.assert_allclose(null.std(), expected, rtol=6 / (2 * len(null)) ** 0.5)  # six standard errors


def test_without_any_patient_a_release_is_noise(tmp_path: Path) -> None:
    """Of the planned size, in every entry."""
    task = task_of(table(3))
    plan = EvaluationPlan(every=1, clip=2.0, noise_multiplier=3.0, bins=1000)

    released = released_statistics(
        build_network(LogisticRegression(name="logistic-regression"), task, seed=0),
        nobody(tmp_path),
        task,
        plan=plan,
        random=repeatable(),
        allow_test_random=True,
    )

    assert (released != 0).all()
    np.testing.assert_allclose(released.std(), 6.0, rtol=6 / (2 * len(released)) ** 0.5)
