"""Texts at a hospital: encoded as every other hospital does, never quoted, and refused where they name somebody."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomli_w

from client.records.manifest import read_manifest
from client.records.report import summarise
from client.records.tabular import checked_table, read_table
from shared_models.errors import RecordsError
from shared_models.pretrained import find_encoder, offer_bases
from shared_models.tasks import NOTE_SPECIALTY, Task, TokensInput, task_of
from shared_models.tokens import encode
from tests.tiny_bases import text_plan, write_encoder

TASK: Task = NOTE_SPECIALTY.model_copy(update={"input": TokensInput(vocabulary=100, length=4)})
MANIFEST: dict[str, Any] = {
    "task": "note-specialty",
    "file": "notes.jsonl",
    "label": "specialty",
    "patient": "patient",
    "validation_fraction": 0.0,
    "columns": {"text": "note"},
    "absent_classes": [name for name in NOTE_SPECIALTY.classes if name not in {"urology", "neurology"}],
}
NOTES = ["Kidney stone, 7 mm.", "Headache since three days, no fever. No cough."]


def write(folder: Path, notes: list[str], file: str = "notes.jsonl", **changes: Any) -> Path:
    """Write manifest and notes, of patients p0, p1, ..., alternately of urology and neurology."""
    manifest = {key: value for key, value in (MANIFEST | {"file": file} | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    rows = [
        {"patient": f"p{n}", "note": note, "specialty": ("urology", "neurology")[n % 2]} for n, note in enumerate(notes)
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pd.DataFrame(rows).to_csv(folder / "notes.csv", index=False)
    pd.DataFrame(rows).to_parquet(folder / "notes.parquet")
    return folder


def refusal(folder: Path) -> str:
    """The words with which a folder is refused."""
    with pytest.raises(RecordsError) as caught:
        checked_table(read_manifest(folder), TASK)
    return f"{caught.value} | {caught.value.hint}"


@pytest.mark.parametrize("file", ["notes.jsonl", "notes.csv", "notes.parquet"])
def test_texts_become_the_tokens_that_everybody_has(tmp_path: Path, file: str) -> None:
    """As ``encode`` says, cut and padded; commas and quotes of a text are its own."""
    notes = [*NOTES, 'Said "no", twice.\nThen slept.']
    write(tmp_path, notes, file)

    records, _ = read_table(read_manifest(tmp_path), TASK, split_key=b"key")

    assert records.inputs[:].tolist() == [encode(note, vocabulary=100, length=4).tolist() for note in notes]
    assert records.targets[:].tolist() == [4, 5, 4]


def test_a_summary_counts_words_and_quotes_none(tmp_path: Path) -> None:
    """``check-data`` of the real task."""
    summary = summarise(write(tmp_path, [*NOTES, NOTES[0]]))

    assert summary.columns[0].found == "4 to 8 words used, 0 texts cut"
    assert summary.repeated_rows == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Write to hans.miller@example.org", "an e-mail address"),
        ("Call (555) 123-4567 tomorrow", "a telephone number"),
        ("SSN 123-45-6789", "a social security number"),
        ("MRN: 00471123, stable", "a labelled record number"),
        ("Patient name: Hans Miller, 60", "a labelled name"),
        ("DOB 01/02/1960. Stable", "a labelled date of birth"),
        ("See https://ehr.example.org/p/17", "a web address"),
    ],
)
def test_what_looks_like_an_identifier_is_refused_or_masked(tmp_path: Path, text: str, what: str) -> None:
    """The row and what it looks like, not the text; masked, the words around it stay."""
    words = refusal(write(tmp_path, [*NOTES, f"Fever. {text}"]))
    masked = checked_table(read_manifest(write(tmp_path, [f"Fever. {text}"], found_in_text="mask")), TASK)

    assert f"row 3, column 'note': looks as if it held {what}" in words
    assert not any(part in words for part in text.split() if len(part) > 5)
    fever, *_ = encode("fever", vocabulary=100, length=1).tolist()
    assert masked.content[:][0, 0] == fever


@pytest.mark.parametrize(
    "text", ["BP 120/80, 500 mg 3x/d, 2019-03-04", "T 37.5-38.5, HR 80-120, 555 1234 ml", "Name unknown; dob unknown."]
)
def test_measurements_and_plain_dates_are_no_identifiers(tmp_path: Path, text: str) -> None:
    """A guard that cries at every number would be switched off."""
    assert len(checked_table(read_manifest(write(tmp_path, [text])), TASK).patients.ids) == 1


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    """Without a word, or a column that is named like an identifier; a column beside it that is."""
    assert "row 1, column 'note': the text has no word" in refusal(write(tmp_path, ["...", NOTES[0]]))
    assert "row 2, column 'note', value '': the value is missing" in refusal(write(tmp_path, [NOTES[0], ""]))
    write(tmp_path, NOTES, columns={"text": "patient_name"})
    lines = (tmp_path / "notes.jsonl").read_text(encoding="utf-8").replace('"note"', '"patient_name"')
    (tmp_path / "notes.jsonl").write_text(lines, encoding="utf-8")
    assert "column 'patient_name' is named like an identifier" in refusal(tmp_path)
    write(tmp_path, NOTES)
    lines = (tmp_path / "notes.jsonl").read_text(encoding="utf-8").replace('"note"', '"Address": "x", "note"')
    (tmp_path / "notes.jsonl").write_text(lines, encoding="utf-8")
    assert "notes.jsonl holds what identifies patients: 'Address'" in refusal(tmp_path)


def test_a_pretrained_tokenizer_stands_behind_the_same_guard(tmp_path: Path) -> None:
    """Its own tokens, cut and padded, of the same file; what looks like an identifier is refused, or masked before."""
    digest = write_encoder(tmp_path / "base")
    offer_bases({digest: tmp_path / "base"})
    task = task_of(text_plan(digest, length=8))
    write(tmp_path, ["Left kidney stone, 7 mm", "The eye: 12 cataracts."])

    records, _ = read_table(read_manifest(tmp_path), task, split_key=b"key")

    encoder = find_encoder(digest)
    pieces = [[encoder.tokenizer.id_to_token(number) for number in row if number] for row in records.inputs[:].tolist()]
    assert pieces == [
        ["[CLS]", "left", "kidney", "stone", ",", "0", "[UNK]", "[SEP]"],
        ["[CLS]", "the", "eye", "[UNK]", "0", "##0", "cataract", "[SEP]"],
    ]
    write(tmp_path, ["The eye.", "Kidney stone; call 0171 5559 4433 or mail jo@example.org."])
    with pytest.raises(RecordsError, match="looks as if it held"):
        read_table(read_manifest(tmp_path), task, split_key=b"key")
    write(tmp_path, ["The eye.", "Kidney stone; mail jo@example.org."], found_in_text="mask")
    masked, _ = read_table(read_manifest(tmp_path), task, split_key=b"key")
    write(tmp_path, ["The eye.", "Kidney stone; mail al@example.com."], found_in_text="mask")
    other, _ = read_table(read_manifest(tmp_path), task, split_key=b"key")
    assert masked.inputs[:].tolist() == other.inputs[:].tolist()
    write(tmp_path, ["The eye.", "..."])
    with pytest.raises(RecordsError, match="no word"):
        read_table(read_manifest(tmp_path), task, split_key=b"key")
