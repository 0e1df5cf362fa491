"""Calling a coordinator's control service as somebody who runs studies, or watches them."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.control_events import from_message
from shared_models.control import control_pb2 as pb
from shared_models.control.connection import ControlConnection, study_fields


class ControlClient(ControlConnection):
    """A connection with the calls of operators and viewers; see ``ControlConnection``."""

    def submit(self, plan: str) -> dict[str, Any]:
        """Submit a plan, TOML or canonical JSON; the same plan again changes nothing.

        Raises:
            ConfigError: The plan is invalid, every error at once.
            FederationError: It could never run; there is another study of this name; the caller may not; no connection.
        """
        request = pb.SubmitRequest(json=plan) if plan.lstrip().startswith("{") else pb.SubmitRequest(toml=plan)
        return self._study(self._stub.Submit, request)

    def show(self, study: str) -> dict[str, Any]:
        """One study, with its plan.

        Raises:
            UnknownStudyError: There is none of this name.
            FederationError: The caller may not; no connection.
        """
        return self._study(self._stub.Show, pb.StudyRequest(study=study))

    def pause(self, study: str) -> dict[str, Any]:
        """Pause a study after the round at hand.

        Raises:
            UnknownStudyError, StudyStateError: There is none, or it is over.
            FederationError: The caller may not; no connection.
        """
        return self._study(self._stub.Pause, pb.StudyRequest(study=study))

    def resume(self, study: str) -> dict[str, Any]:
        """Go on with a paused study. Raises as ``pause``."""
        return self._study(self._stub.Resume, pb.StudyRequest(study=study))

    def stop(self, study: str) -> dict[str, Any]:
        """End a study for good. Raises as ``pause``."""
        return self._study(self._stub.Stop, pb.StudyRequest(study=study))

    def watch(
        self, study: str, after: int = 0, *, patience_s: float = math.inf, lost: Callable[[str], None] = lambda _: None
    ) -> Iterator[dict[str, Any]]:
        """A study's events after a position, as the journal has them, until it is over.

        Every event has ``study`` and ``position`` too. Events called ``state`` come first, and whenever the study's
        state changes: ``state``, ``reason``, ``rounds_done``, ``rounds``, ``queue``. When the connection is lost, it is
        made again, and nothing is missed or said twice but ``state``.

        Args:
            study: Its name.
            after: The position of the last event that is known.
            patience_s: How long to try in vain to connect again; what never was connected is not tried again.
            lost: Is told whenever the connection is lost.

        Raises:
            UnknownStudyError: There is none of this name.
            FederationError: The caller may not, or may no longer; no connection for as long as ``patience_s``.
        """

        def begin() -> Any:
            return self._stub.Watch(pb.WatchRequest(study=study, after=after))

        for message in self._followed(begin, patience_s=patience_s, lost=lost):
            after = message.position
            yield from_message(message)

    def fetch_model(self, study: str, out: Path) -> str:
        """Fetch a finished study's model; a part that is there already is gone on with. Returns its SHA-256.

        Raises:
            TransferError: It came over with another digest, or cannot be written.
            StudyStateError: The study is not finished.
            FederationError: The caller may not; no connection.
        """
        return self._fetch(self._stub.Model, pb.FetchRequest(study=study), out)

    def _study(self, method: Any, request: Any) -> dict[str, Any]:
        return study_fields(self._call(method, request))
