"""Does the evidence of several parties agree? Hospitals' with each other, and with what their coordinator kept.

A ledger that was cut or rewritten lacks what its hospital signed for, and a list that was shown to one is not the list
that was shown to another.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain

from auditor.evidence import StudyFolder, View, Witness, about, out_of_order, signed_by_any
from auditor.findings import COORDINATOR, Finding
from auditor.record import AttemptRecord, Turn
from shared_models.secagg.key_agreement import Roster

CLOCKS_APART_S = 3600.0  # of charges for one attempt; hospitals charge when they are asked, within minutes


def cross_check(
    witnesses: Sequence[Witness], studies: Sequence[StudyFolder], rosters: Mapping[str, Roster]
) -> list[Finding]:
    """Compare everything that several parties hold of the same thing.

    Guarantees:
        * Every receipt that a coordinator holds of a bundled hospital is in its bundle, and so paid for in its ledger;
          every upload that a signed list of uploaders names has its receipt on both sides.
        * Every receipt of a hospital whose bundle is not here is signed by the key that the roster has of it, and
          there is one for each of its uploads in the coordinator's signed lists.
        * Of one attempt nobody was told another announcement, U1 or U3, and of one moment no other digest over all
          receipts, than anybody else whose evidence is here.

    Args:
        witnesses: Bundles that hold by themselves.
        studies: What the coordinator kept.
        rosters: By digest.

    Returns:
        What does not agree; empty if everything does.
    """
    found = [*_doubles(witnesses), *_keys(witnesses), *_forks(witnesses, studies), *_digests(witnesses)]
    for study in studies:
        found += [*_order(study), *_unsound(study)]
        for witness in witnesses:
            found += _both_sides(witness, study)
        found += _absent(study, rosters, {witness.hospital for witness in witnesses})
    holders = _holders(witnesses, studies)
    for witness in witnesses:
        found += [*_uploads(witness, holders), *_sums(witness, studies)]
    found += [*_gaps(studies), *_clocks(witnesses), *_software(witnesses)]
    return list(dict.fromkeys(found))


def attempts(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> tuple[AttemptRecord, ...]:
    """Every attempt that anybody holds, in the order of rounds; the coordinator's account where there are several."""
    known: dict[Turn, AttemptRecord] = {kept.turn: kept for study in studies for kept in study.sums}
    for witness in witnesses:
        for view in witness.views:
            one = known.get(view.turn)
            if one is None:
                one = AttemptRecord(view.turn, view.invited, view.cohort, view.uploaders, frozenset())
            known[view.turn] = replace(one, known_to=one.known_to | {witness.hospital})
    return tuple(
        sorted(
            known.values(), key=lambda kept: (kept.turn.study, kept.turn.round, kept.turn.purpose != "train", kept.turn)
        )
    )


def participants(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> set[str]:
    """Whose updates were ever in a sum, by anybody's signed lists."""
    return {name for _, view in _all(witnesses, studies) for name in view.uploaders}


def _doubles(witnesses: Sequence[Witness]) -> Iterator[Finding]:
    names = [witness.hospital for witness in witnesses]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Finding(code="two-bundles", party=name, what=f"there are two bundles of {name}")


def _keys(witnesses: Sequence[Witness]) -> Iterator[Finding]:
    """A ledger signed by a key that other hospitals do not know its hospital by is a forgery of the whole chain."""
    for witness in witnesses:
        for other in witnesses:
            known = other.identities.get(witness.hospital)
            if known is not None and known not in witness.keys:
                what = f"{witness.hospital}'s ledger has another key than {other.hospital} knows it by"
                yield Finding(code="foreign-key", party=witness.hospital, what=what)


def _forks(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> Iterator[Finding]:
    seen: dict[Turn, list[tuple[str, View]]] = defaultdict(list)
    for who, view in _all(witnesses, studies):
        seen[view.turn].append((who, view))
    for views in seen.values():
        (first, reference), *others = views
        for who, view in others:
            what = None if view is reference else _fork(reference, view)
            if what:
                yield about(view, "fork", COORDINATOR, f"{_words(first)} and {_words(who)} hold different {what}")


def _fork(one: View, other: View) -> str | None:
    if one.announced != other.announced:
        return "announcements"
    if one.cohort and other.cohort and one.context != other.context:
        return "cohorts (U1)"
    if any(one.commitments.get(dealer, digest) != digest for dealer, digest in other.commitments.items()):
        return "commitments (U2)"
    if one.uploaders and other.uploaders and one.uploaders != other.uploaders:
        return "lists of uploaders (U3)"
    return None


def _digests(witnesses: Sequence[Witness]) -> Iterator[Finding]:
    told: dict[Turn, tuple[str, str]] = {}
    for witness in witnesses:
        for turn, everybody in witness.shown:
            who, digest = told.setdefault(turn, (witness.hospital, everybody))
            if digest != everybody:
                yield Finding(
                    code="digests-differ",
                    party=COORDINATOR,
                    what=f"{turn.purpose}: {who} and {witness.hospital} were shown different digests over all receipts",
                    study=turn.study,
                    round=turn.round,
                    attempt=turn.attempt,
                )


def _order(study: StudyFolder) -> Iterator[Finding]:
    """A coordinator keeps things as they happen."""
    if list(out_of_order(study.views)):
        what = f"{study.path / 'sums.jsonl'} is out of order, or has an attempt twice"
        yield Finding(code="out-of-order", party=COORDINATOR, what=what)
    places = {view.context: place for place, view in enumerate(study.views) if view.context}
    held = [(places.get(upload.context, -1), upload.hospital) for upload, _ in study.uploads]
    if any(place < 0 for place, _ in held):
        what = f"{study.path}: a receipt belongs to no sum that the coordinator kept"
        yield Finding(code="missing-sum", party=COORDINATOR, what=what)
    if held != sorted(set(held)):
        what = f"{study.path / 'receipts.jsonl'} is out of order, or has a receipt twice"
        yield Finding(code="out-of-order", party=COORDINATOR, what=what)


def _unsound(study: StudyFolder) -> Iterator[Finding]:
    for view in study.views:
        if view.problem:
            yield about(view, "bad-transcript", COORDINATOR, view.problem)


def _both_sides(witness: Witness, study: StudyFolder) -> Iterator[Finding]:
    name, own = witness.hospital, {upload.digest for upload in witness.uploads}
    for upload, kept in study.uploads:
        if upload.hospital != name or upload.digest in own:
            continue
        if signed_by_any(kept, witness.keys):
            what = f"the coordinator holds a receipt that {name}'s evidence lacks: it was cut, or rolled back"
            yield about(upload, "rolled-back", name, f"{upload.type}: {what}")
        else:
            what = f"the coordinator holds a receipt that {name} did not sign"
            yield about(upload, "foreign-receipt", COORDINATOR, f"{upload.type}: {what}")


def _absent(study: StudyFolder, rosters: Mapping[str, Roster], present: Collection[str]) -> Iterator[Finding]:
    """Receipts of hospitals whose bundles are not here, as far as their signatures and the signed lists reach."""
    sums = {view.context: view for view in study.views if view.context}
    held = {(upload.hospital, upload.context) for upload, _ in study.uploads}
    for upload, kept in study.uploads:
        view = sums.get(upload.context)
        roster = rosters.get(view.roster) if view else None
        if view is None or roster is None or upload.hospital in present:
            continue
        key = roster.identities.get(upload.hospital)
        if key is None or not signed_by_any(kept, [key]):
            what = f"the coordinator holds a receipt that {upload.hospital} did not sign"
            yield about(view, "foreign-receipt", COORDINATOR, what)
        elif (upload.study, upload.round, upload.attempt) != (view.turn.study, view.turn.round, view.turn.attempt):
            what = f"the receipt of {upload.hospital} is for another attempt"
            yield about(view, "receipt-differs", COORDINATOR, what)
    for context, view in sums.items():
        for name in sorted(set(view.uploaders) - set(present)):
            if (name, context) not in held:
                what = f"{name} uploaded, and the coordinator's receipts lack it"
                yield about(view, "missing-receipt", COORDINATOR, what)


def _holders(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> dict[str, list[tuple[str, View]]]:
    """By hospital: every signed list of uploaders that names it, once for each holder of a different one."""
    found: dict[str, list[tuple[str, View]]] = defaultdict(list)
    seen = set[tuple[Turn, str | None, tuple[str, ...]]]()
    for who, view in _all(witnesses, studies):
        key = (view.turn, view.context, view.uploaders)
        if key not in seen:
            seen.add(key)
            for name in view.uploaders:
                found[name].append((who, view))
    return found


def _uploads(witness: Witness, holders: Mapping[str, Sequence[tuple[str, View]]]) -> Iterator[Finding]:
    """Every upload in a signed list was paid for, and its receipt is in the hospital's own evidence."""
    name, own = witness.hospital, {upload.context for upload in witness.uploads}
    for who, view in holders.get(name, ()):
        if view.context and view.context not in own:
            what = f"{_words(who)} holds that {name} uploaded, and its own evidence lacks the receipt"
            yield about(view, "missing-receipt", name, what)


def _sums(witness: Witness, studies: Sequence[StudyFolder]) -> Iterator[Finding]:
    """What a hospital took part in, the coordinator kept; what ended before U3 was signed, nobody need have kept."""
    for study in studies:
        name = witness.hospital
        held = {upload.context for upload, _ in study.uploads if upload.hospital == name}
        summed = {view.context for view in study.views}
        names = {view.turn.study for view in study.views} | {upload.study for upload, _ in study.uploads}
        for view in witness.views:
            if view.turn.study not in names or not view.uploaders:
                continue
            if view.context not in summed:
                what = f"{name} took part, and the coordinator's sums lack it"
                yield about(view, "missing-sum", COORDINATOR, what)
            elif name in view.uploaders and view.context not in held:
                what = f"{name} uploaded, and the coordinator's receipts lack it"
                yield about(view, "missing-receipt", COORDINATOR, what)


def _gaps(studies: Sequence[StudyFolder]) -> Iterator[Finding]:
    """Rounds follow each other without a gap: each was an attempt at least."""
    for study in studies:
        rounds: dict[str, set[int]] = defaultdict(set)
        for view in study.views:
            if view.turn.purpose == "train":
                rounds[view.turn.study].add(view.turn.round)
        for name, found in rounds.items():
            missing = sorted(set(range(1, max(found) + 1)) - found)
            if missing:
                what = f"the coordinator kept no sum of round {missing[0]}" + (
                    f", nor of {len(missing) - 1} others" if len(missing) > 1 else ""
                )
                yield Finding(code="missing-sum", party=COORDINATOR, what=what, study=name, round=missing[0])


def _clocks(witnesses: Sequence[Witness]) -> Iterator[Finding]:
    """A hospital whose charges for an attempt come long after or before everybody else's has another clock."""
    charged: dict[tuple[str | None, str, int | None, int | None], list[tuple[str, str, int]]] = defaultdict(list)
    for witness in witnesses:
        for line in witness.record.lines:
            if line.kind == "charge" and line.mechanism is not None:
                turn = (line.study, line.mechanism.kind, line.round, line.attempt)
                charged[turn].append((line.time, witness.hospital, line.seq))
    told = set[tuple[str, str]]()
    for (study, _, number, attempt), times in charged.items():
        (early, first, _), (late, last, entry) = min(times), max(times)
        apart = (datetime.fromisoformat(late) - datetime.fromisoformat(early)).total_seconds()
        if apart > CLOCKS_APART_S and (first, last) not in told:
            told.add((first, last))
            what = f"{first} charged at {early}, {last} at {late}: {apart:.0f} s apart"
            yield Finding(
                code="clocks-apart", party=last, what=what, study=study, round=number, attempt=attempt, entry=entry
            )


def _software(witnesses: Sequence[Witness]) -> Iterator[Finding]:
    used: dict[str | None, dict[str, str]] = defaultdict(dict)
    for witness in witnesses:
        for line in witness.record.lines:
            if line.kind == "charge" and line.software_digest:
                used[line.study].setdefault(line.software_digest, witness.hospital)
    for study, digests in used.items():
        if len(digests) > 1:
            which = ", ".join(f"{digest[:12]} (first at {who})" for digest, who in digests.items())
            what = f"updates were computed by {len(digests)} different versions of the software: {which}"
            yield Finding(code="software-differs", party=next(iter(digests.values())), what=what, study=study)


def _words(party: str) -> str:
    return "the coordinator" if party == COORDINATOR else party


def _all(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> Iterator[tuple[str, View]]:
    return chain(
        ((COORDINATOR, view) for study in studies for view in study.views),
        ((witness.hospital, view) for witness in witnesses for view in witness.views),
    )
