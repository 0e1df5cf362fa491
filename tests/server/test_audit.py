"""The coordinator's audit log: whole after every crash, and no change to it goes unseen."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audit import LOG, PUBLIC, AuditLog, export_lines
from shared_models.audit_log import VerifiedLog, follow_export, read_export, verify_export
from shared_models.errors import AuditError, IdentityError
from shared_models.identity import create_key, fingerprint, load_key, public_bytes, read_public
from shared_models.privacy.head import head_path


def written(folder: Path, calls: int = 5) -> Path:
    """A folder with a log of some calls, every other one refused, and those that were allowed ended."""
    with AuditLog(folder) as audit:
        audit.append("started")
        for number in range(calls):
            about = {"call": "Control/Stop", "caller": "anna", "role": "operator", "study": f"study-{number}"}
            if number % 2:
                audit.append("call", outcome="refused", code="not-allowed", **about)
            else:
                line = audit.append("call", outcome="allowed", **about)
                audit.append("done", of=line, outcome="succeeded")
    return folder


def verified(lines: list[bytes], key: bytes | None = None) -> VerifiedLog:
    return verify_export(iter(lines), key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """An export of a log that nobody touched."""
    return list(export_lines(written(tmp_path_factory.mktemp("log"))))


def test_a_log_that_nobody_touched_holds(tmp_path: Path) -> None:
    """It names its key and counts its calls; ``audit.pub`` is the key that it names."""
    lines = list(export_lines(written(tmp_path)))

    found = verified(lines, read_public(tmp_path / PUBLIC))

    assert (found.entries, found.calls, found.refused) == (10, 5, 2)
    assert found.key == fingerprint(read_public(tmp_path / PUBLIC))


def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    """The key signs whatever the log says; the log names people."""
    written(tmp_path)

    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("audit.*l*")} == {LOG: 0o600} | {
        f"{LOG}.head": 0o644
    }
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600


@given(data=st.data())
def test_no_changed_byte_goes_unseen(whole: list[bytes], data: st.DataObject) -> None:
    """One bit of one byte, anywhere in an export, its head included."""
    text = bytearray(b"\n".join(whole))
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(AuditError):
        verified(bytes(text).split(b"\n"))


EDITS: dict[str, Callable[[list[bytes], int, int], list[bytes]]] = {
    "a line is removed": lambda lines, i, _: lines[:i] + lines[i + 1 :],
    "a line is said twice": lambda lines, i, _: lines[: i + 1] + lines[i:],
    "a line is moved": lambda lines, i, j: [*(rest := lines[:i] + lines[i + 1 :])[:j], lines[i], *rest[j:]],
    "two lines are swapped": lambda lines, i, j: [
        lines[j] if n == i else lines[i] if n == j else line for n, line in enumerate(lines)
    ],
    "the beginning is cut off": lambda lines, i, _: lines[i + 1 :],
    "the end is cut off": lambda lines, i, _: lines[:i],
    "the end is cut off, and the head kept": lambda lines, i, _: [*lines[: min(i, len(lines) - 2)], lines[-1]],
}


@pytest.mark.parametrize("edit", EDITS)
@given(data=st.data())
def test_no_edit_goes_unseen(whole: list[bytes], edit: str, data: st.DataObject) -> None:
    """Lines of the log itself, removed, repeated, moved, swapped or cut off."""
    one, other = (data.draw(st.integers(0, len(whole) - 1)) for _ in range(2))
    edited = EDITS[edit](whole, one, other)
    if edited == whole:
        return

    with pytest.raises(AuditError):
        verified(edited)


def test_lines_of_another_key_do_not_fit_in(whole: list[bytes], tmp_path: Path) -> None:
    """Who has not the key cannot go on with a log, nor replace it as long as its key is known."""
    other = list(export_lines(written(tmp_path)))
    ours = bytes.fromhex(next(follow_export(iter(whole))).public_key or "")

    with pytest.raises(AuditError, match="line 6"):
        verified([*whole[:5], *other[5:]])
    with pytest.raises(AuditError, match="the log is another's"):
        verified(other, ours)


def test_an_older_head_is_no_end(tmp_path: Path) -> None:
    """An export with the head of an earlier one would hide what came after it."""
    with AuditLog(tmp_path) as audit:
        early = list(export_lines(tmp_path))
        audit.append("started")
    late = list(export_lines(tmp_path))

    with pytest.raises(AuditError, match="head"):
        verified([*late[:-1], early[-1]])


def test_a_call_ends_once(tmp_path: Path) -> None:
    """Also a coordinator that signs whatever it likes cannot say that a call ended that was never made."""
    with AuditLog(tmp_path) as audit:
        line = audit.append("call", call="Control/Stop", outcome="refused")
        audit.append("done", of=line, outcome="succeeded")

    with pytest.raises(AuditError, match="line 3: it ends the call of line 2"):
        verified(list(export_lines(tmp_path)))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_a_line_is_taken_back(tmp_path: Path, cut: int) -> None:
    """A process that was killed while it wrote leaves a log that opens, holds, and goes on."""
    log = written(tmp_path) / LOG
    before, last = log.read_bytes(), log.read_bytes().splitlines()[-1]
    with log.open("ab") as file:
        file.write(last[:cut])

    with AuditLog(tmp_path) as audit:
        audit.append("started")

    assert log.read_bytes().startswith(before)
    assert verified(list(export_lines(tmp_path))).entries == 11


def test_a_head_one_line_behind_is_mended(tmp_path: Path) -> None:
    """Killed between the line and the head."""
    written(tmp_path, 4)
    head = head_path(tmp_path / LOG).read_bytes()
    with AuditLog(tmp_path) as audit:
        audit.append("started")
    head_path(tmp_path / LOG).write_bytes(head)

    with AuditLog(tmp_path):
        pass

    assert verified(list(export_lines(tmp_path))).entries == 9


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda folder: (folder / LOG).unlink(), "is gone"),
        (lambda folder: (folder / "audit.key").unlink(), "is gone"),
        (lambda folder: head_path(folder / LOG).unlink(), "is missing"),
        (lambda folder: os.truncate(folder / LOG, (folder / LOG).read_bytes().rfind(b"\n", 0, -1) + 1), "was|ends at"),
        (lambda folder: (folder / LOG).write_bytes((folder / LOG).read_bytes().replace(b"anna", b"otto", 1)), "line"),
        (lambda folder: (folder / LOG).write_bytes(b""), "ends at line 0"),
    ],
    ids=["log", "key", "head", "cut", "edited", "emptied"],
)
def test_a_log_that_was_changed_does_not_open(tmp_path: Path, harm: Callable[[Path], object], what: str) -> None:
    """The service does not start on it: what it cannot write down it does not do."""
    harm(written(tmp_path))

    with pytest.raises(AuditError, match=what):
        AuditLog(tmp_path)


def test_another_key_does_not_open_it(tmp_path: Path) -> None:
    """A log has one key from end to end."""
    (written(tmp_path) / "audit.key").unlink()
    create_key(tmp_path / "audit.key")

    with pytest.raises(AuditError, match="not signed by"):
        AuditLog(tmp_path)
    (tmp_path / "audit.key").chmod(0o644)
    with pytest.raises(IdentityError, match="open to others"):
        AuditLog(tmp_path)


def test_a_line_that_does_not_fit_the_disk_is_taken_back(tmp_path: Path) -> None:
    """What was refused is not in the log, and the log goes on once there is room."""
    audit = AuditLog(written(tmp_path))
    before = (tmp_path / LOG).read_bytes()
    real = audit._file

    class Full:
        """A file on a disk that is full after ten bytes."""

        def write(self, content: bytes) -> int:
            if len(content) > 10:
                real.write(content[:10])
                raise OSError(28, "No space left on device")
            return 0

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    audit._file = Full()  # type: ignore[assignment]
    with pytest.raises(AuditError, match="No space left"):
        audit.append("call", call="Control/Stop")
    audit._file = real

    assert (tmp_path / LOG).read_bytes() == before
    assert audit.append("started") == 11
    audit.close()
    assert verified(list(export_lines(tmp_path))).entries == 11


def test_an_export_that_was_cut_in_a_line_is_said_so(tmp_path: Path) -> None:
    """A copy that did not finish is not half believed."""
    export = tmp_path / "export.jsonl"
    export.write_bytes(b"\n".join(export_lines(written(tmp_path))))

    with pytest.raises(AuditError, match="in the middle of a line"):
        verify_export(read_export(export))


def test_the_key_is_the_same_after_a_restart(tmp_path: Path) -> None:
    """Whoever has written down its fingerprint finds it again."""
    keys = set()
    for _ in range(2):
        with AuditLog(tmp_path) as audit:
            keys.add(audit.public_key)

    assert keys == {public_bytes(load_key(tmp_path / "audit.key"))}
