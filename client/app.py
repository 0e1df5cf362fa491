"""Flower's ClientApp of a hospital: message in, ``round.py``, message out.

Only what is registered here can ever run, and it is this installed file: the daemon never fetches a bundle.
"""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.evidence import REFUSALS, EvidenceFile, refusal
from client.round import Hospital
from shared_models.errors import FederationError, LedgerError, PendingError, RecordsError, SoftwareChangedError
from shared_models.messages import (
    AdvertiseRequest,
    AgreeRequest,
    Body,
    EvaluateRequest,
    Lanes,
    Proposal,
    ShareRequest,
    StudyEnd,
    TrainRequest,
    UnmaskRequest,
    body_text,
    decode,
    refusal_of,
    reply,
)

log = logging.getLogger("konsil.hospital")

app = ClientApp()

BodyType = TypeVar("BodyType", bound=Body)
Station = Callable[[Hospital, Any, Any], tuple[Body, Lanes | None]]

_hospitals: dict[str, Hospital] = {}


def hospital_at(settings_file: str) -> Hospital:
    """The hospital whose settings these are; opened once and kept warm for the life of the process."""
    if settings_file not in _hospitals:
        _hospitals[settings_file] = Hospital.open(Path(settings_file))
    return _hospitals[settings_file]


def close_hospital(settings_file: str) -> None:
    """Close one hospital, as the end of its process would; what it knew of an attempt under way is gone."""
    if settings_file in _hospitals:
        _hospitals.pop(settings_file).close()


def close_hospitals() -> None:
    """Close every hospital that this process opened, and with it the lock on its ledger."""
    while _hospitals:
        _hospitals.popitem()[1].close()


def _answer(message: Message, context: Context, expected: type[BodyType], station: Station) -> Message:
    """Run one station of the round. Whatever goes wrong, only a code leaves the hospital.

    Raises:
        LedgerError: It cannot be written down what is about to leave. So nothing leaves, and the daemon stops.
    """
    try:
        hospital = hospital_at(str(context.node_config["settings"]))
        hospital.refresh()
        body, vector = decode(message.content, expected)
        answer, lanes = station(hospital, body, vector)
        hospital.egress.reply(answer, lanes, about=hospital.announcement, to=body)
        return reply(answer, lanes, to=message)
    except RecordsError as error:  # its text names a cell: for the steward's terminal, not for a log
        log.warning("refused %s: the records do not fit; run konsil-hospital check-data", expected.__name__)
        return _refuse(message, context, error)
    except PendingError as error:  # the log has it once, and the coordinator asks again and again
        waits = type(error) in {PendingError, SoftwareChangedError}
        log.log(logging.DEBUG if waits else logging.WARNING, "%s", error)
        return _refuse(message, context, error, keep=False)
    except FederationError as error:
        log.warning("refused %s: %s (%s)", expected.__name__, error, error.hint)
        return _refuse(message, context, error)
    except Exception as error:  # the last resort before the wire
        what = (expected.__name__, type(error).__name__, _where(error))
        log.error("failed at %s: %s\n%s", *what)  # noqa: TRY400 - logging.exception would write the text
        return _refuse(message, context, error)


def _refuse(message: Message, context: Context, error: Exception, *, keep: bool = True) -> Message:
    """Say no, and keep what was refused: what the peer sent and the code it got, never the error's text."""
    answer = refusal_of(error)
    hospital = _hospitals.get(str(context.node_config["settings"]))
    if hospital is not None:
        hospital.egress.reply(answer, None)
    if hospital is not None and keep:
        kept = refusal(message.metadata.message_type, answer.code, message.metadata.message_id, body_text(message))
        try:
            EvidenceFile(hospital.settings.state / REFUSALS).write(**kept)
        except LedgerError as full:  # the answer is no either way
            log.warning("%s (%s)", full, full.hint)
    return reply(answer, None, to=message)


def _where(error: Exception) -> str:
    """The traceback without the exception's text, which could hold a patient's values."""
    return "".join(traceback.format_tb(error.__traceback__))


@app.query("propose")
def propose(message: Message, context: Context) -> Message:
    """A study is proposed."""
    return _answer(message, context, Proposal, lambda hospital, body, _: (hospital.enrol(body), None))


@app.query("advertise")
def advertise(message: Message, context: Context) -> Message:
    """Stage 1 of a sum."""
    return _answer(message, context, AdvertiseRequest, lambda hospital, body, _: (hospital.advertise(body), None))


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Stage 2 of a sum."""
    return _answer(message, context, ShareRequest, lambda hospital, body, _: (hospital.share(body), None))


@app.train("round")
def train(message: Message, context: Context) -> Message:
    """Stage 3 of a sum of updates."""
    return _answer(message, context, TrainRequest, Hospital.train)


@app.evaluate("round")
def evaluate(message: Message, context: Context) -> Message:
    """Stage 3 of a sum of validation statistics."""
    return _answer(message, context, EvaluateRequest, Hospital.evaluate)


@app.query("agree")
def agree(message: Message, context: Context) -> Message:
    """Stage 4 of a sum."""
    return _answer(message, context, AgreeRequest, lambda hospital, body, _: (hospital.agree(body), None))


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Stage 5 of a sum."""
    return _answer(message, context, UnmaskRequest, lambda hospital, body, _: (hospital.unmask(body), None))


@app.query("finish")
def finish(message: Message, context: Context) -> Message:
    """The study is over."""
    return _answer(message, context, StudyEnd, lambda hospital, body, _: (hospital.finish(body), None))
