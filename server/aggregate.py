"""One attempt at an encrypted sum, over messages: five stages, one request out to each hospital and one reply back.

What may be asked, received and concluded is ``shared_models/secagg/protocol.py``'s business; here it meets the network.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.gather import Answer
from shared_models.errors import FederationError, ProtocolError
from shared_models.messages import (
    Advertised,
    AdvertiseRequest,
    Agreed,
    AgreeRequest,
    Body,
    Complained,
    Dealt,
    EvaluateRequest,
    ReleasedStatistics,
    ShareRequest,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    Update,
    Upload,
    Vector,
)
from shared_models.receipts import Anchor
from shared_models.secagg.protocol import Coordinator

Ask = Callable[[Mapping[str, tuple[Body, Vector | None]]], Iterator[Answer]]


class Attempt:
    """One attempt at a sum.

    Args:
        party: The protocol's coordinator, fresh.
        ask: Sends requests and yields the answers as they come, until a deadline.
        check: Looks at an upload's body before its vector counts: (hospital, body); raises to leave it out.
        anchor: What to show a hospital of what it signed, before it is asked for more.
        leave_out: Is told whose reply was refused or no reply, and why: (hospital, stage, answer, error).
        about_to: Is told each stage before its requests go out.

    Attributes:
        charged: Whether hospitals were asked to compute, and so have paid, or may have.
        uploads: What the uploaders sent along with their vectors, by name.
        seconds: How long each stage took.
    """

    def __init__(
        self,
        party: Coordinator,
        *,
        ask: Ask,
        check: Callable[[str, Upload], None],
        leave_out: Callable[[str, str, Answer, FederationError], None],
        anchor: Callable[[str], Anchor],
        about_to: Callable[[str], None],
    ) -> None:
        self.party, self.charged = party, False
        self.uploads: dict[str, Upload] = {}
        self.seconds: dict[str, float] = {}
        self._ask, self._check, self._leave_out, self._anchor = ask, check, leave_out, anchor
        self._about_to = about_to

    def run(self, parameters: Vector) -> NDArray[np.uint32]:
        """Go through the five stages.

        Args:
            parameters: Global parameters, shape ``(d,)``, as announced.

        Returns:
            The sum modulo 2**32 of what ``party.survivors`` uploaded.

        Raises:
            TooFewLeftError: Fewer than the threshold replied in some stage. Nothing is unmasked.
            AttemptEndedError, InconsistentDealerError: A dealer is at fault; ``party.at_fault`` says who.
        """
        party, announcement = self.party, self.party.announcement
        requests: dict[str, tuple[Body, Vector | None]] = {
            name: (AdvertiseRequest(announcement=announcement, anchor=self._anchor(name)), None)
            for name in announcement.invited
        }
        self._stage("advertise", requests, self._advertised)
        cohort = party.cohort()
        members = [member.hospital for member in cohort.members]
        self._stage("share", dict.fromkeys(members, (ShareRequest(cohort=cohort), None)), self._dealt)
        kind = TrainRequest if announcement.purpose == "train" else EvaluateRequest
        deliveries = party.deliveries()
        self.charged = True
        requests = {name: (kind(delivery=delivery), parameters) for name, delivery in deliveries.items()}
        self._stage("train", requests, self._uploaded)
        survivors = party.survivors()
        agree = AgreeRequest(survivors=survivors)
        self._stage("agree", dict.fromkeys(survivors.uploaders, (agree, None)), self._agreed)
        unmasking = party.unmasking()
        signers = [agreement.hospital for agreement in unmasking.agreements]
        self._stage("unmask", dict.fromkeys(signers, (UnmaskRequest(unmasking=unmasking), None)), self._unmasked)
        return party.total()

    def _stage(
        self, name: str, requests: Mapping[str, tuple[Body, Vector | None]], take: Callable[[Answer], None]
    ) -> None:
        """Ask everybody; what a hospital does wrong costs it its place, and the attempt only if it must."""
        started = time.monotonic()
        self._about_to(name)
        for answer in self._ask(requests):
            try:
                take(answer)
            except FederationError as error:
                self._leave_out(answer.hospital, name, answer, error)
            if self.party.at_fault:  # a complaint: the attempt is over, whatever else would come
                break
        self.seconds[name] = round(time.monotonic() - started, 4)

    def _advertised(self, answer: Answer) -> None:
        body = _expect(answer, Advertised)
        self.party.receive_advertisement(answer.hospital, body.advertisement)

    def _dealt(self, answer: Answer) -> None:
        self.party.receive_dealing(answer.hospital, _expect(answer, Dealt).dealing)

    def _uploaded(self, answer: Answer) -> None:
        hospital = answer.hospital
        if isinstance(answer.body, Complained):
            self.party.receive_complaint(hospital, answer.body.complaint)
            return
        kind = Update if self.party.announcement.purpose == "train" else ReleasedStatistics
        body: Upload = _expect(answer, kind)
        announced = self.party.announcement
        if (body.study, body.round, body.attempt) != (announced.study, announced.round, announced.attempt):
            raise ProtocolError("an answer to another round", hint="Its upload is dropped.")
        self._check(hospital, body)
        self.party.receive_upload(hospital, bytes.fromhex(body.context), _lanes(answer))
        self.uploads[hospital] = body

    def _agreed(self, answer: Answer) -> None:
        self.party.receive_agreement(answer.hospital, _expect(answer, Agreed).agreement)

    def _unmasked(self, answer: Answer) -> None:
        self.party.receive_revealed(answer.hospital, _expect(answer, Unmasked).revealed)


def _expect(answer: Answer, kind: type[Any]) -> Any:
    if not isinstance(answer.body, kind):
        raise ProtocolError(answer.problem or "another message than asked for", hint="See the hospital's log.")
    return answer.body


def _lanes(answer: Answer) -> NDArray[np.uint32]:
    if answer.vector is None:
        raise ProtocolError("an upload without its vector", hint="It is dropped.")
    return answer.vector.view(np.uint32)
