"""Who is at the hospital's page: sessions that end, and the guard that lets nobody else through."""

import hashlib
import hmac
import logging
import secrets
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from shared_models.listening import names_loopback

log = logging.getLogger("konsil.hospital")

IDLE_S, SESSION_S = 30 * 60.0, 8 * 3600.0
MOST_SESSIONS = 20
# These say nothing about the hospital.
OPEN = frozenset({"/login", "/login/certificate", "/language", "/page.css", "/page.js", "/icon.svg"})
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with "no-referrer" a form's Origin would be "null"
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


Scope = MutableMapping[str, Any]


@dataclass
class Session:
    """Somebody who is logged in.

    Attributes:
        token: In every form, so that a form of another site has none.
        proof: Digest of what let them in: of what the password was kept as, or of the certificate. When that lets in
            nobody any more, the session ends.
        by: In the log, the way in: ``password``, or which certificate.
        begun: When, by the monotonic clock.
        used: When last by a person; a page that looks whether something changed is nobody.
    """

    token: str
    proof: bytes
    by: str
    begun: float
    used: float

    @property
    def over(self) -> bool:
        """Whether it has lasted, or was not used, for too long."""
        now = time.monotonic()
        return now > self.begun + SESSION_S or now > self.used + IDLE_S


class Sessions:
    """Who is logged in; kept in memory only, so that a restart ends all of them."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._turn = threading.Lock()

    def begin(self, proof: bytes, by: str) -> str:
        """A new session's name; of too many the oldest ends."""
        name, now = secrets.token_urlsafe(32), time.monotonic()
        with self._turn:
            self._sessions = {key: one for key, one in self._sessions.items() if not one.over}
            while len(self._sessions) >= MOST_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[digest(name)] = Session(secrets.token_urlsafe(32), proof, by, now, now)
        return name

    def find(self, name: str, proofs: Sequence[bytes], *, by_hand: bool) -> Session | None:
        """The session of that name, if what it began with is still among the proofs; used by a person, it goes on."""
        with self._turn:
            found = self._sessions.get(digest(name))
            if found is None or found.over:
                return None
            if not any(hmac.compare_digest(found.proof, proof) for proof in proofs):
                return None
            if by_hand:
                found.used = time.monotonic()
            return found

    def end(self, name: str) -> None:
        """Log out."""
        with self._turn:
            self._sessions.pop(digest(name), None)


class Guard:
    """In front of the page: refuses whom it is not for, and writes what every answer carries.

    Guarantees:
        * A request must name this machine as its host: a foreign page whose name was made to point here (DNS
          rebinding) names its own.
        * What changes something must come from this very origin, which a browser says of itself.
        * An error's own text is in no answer and in no log.

    Args:
        app: The page.
        sessions: Who is logged in.
        cookie: Name of the sessions' cookie.
        scheme: That the page is served by: ``http`` or ``https``.
        proofs: What would let in whoever sends a request, now; see ``Session``.
    """

    def __init__(
        self,
        app: FastAPI,
        sessions: Sessions,
        *,
        cookie: str,
        scheme: str,
        proofs: Callable[[Request], Sequence[bytes]],
    ) -> None:
        self._app, self._sessions, self._cookie, self._scheme, self._proofs = app, sessions, cookie, scheme, proofs

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """One request, as ASGI has it."""

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode("ascii"), value.encode("ascii")) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None and refusal.status_code != 303:
            log.warning("the page refused a request: %d", refusal.status_code)
        try:
            await (refusal or self._app)(scope, receive, send_with_headers)
        except Exception as error:  # it was answered with a 500; here its text, which may quote a record, ends
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("the page failed: %s\n%s", type(error).__name__, where)  # noqa: TRY400 - no text

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not names_loopback(host):
            return _refused(421)
        if request.method not in {"GET", "HEAD"} and request.headers.get("origin") != f"{self._scheme}://{host}":
            return _refused(403)
        by_hand = "x-konsil-live" not in request.headers
        name = request.cookies.get(self._cookie, "")
        session = self._sessions.find(name, self._proofs(request), by_hand=by_hand)
        request.state.session = session
        if session is not None or request.url.path in OPEN:
            return None
        return RedirectResponse("/login", status_code=303)


def _refused(status: int) -> Response:
    """In plain words, because nothing is known of who asks, not even the language."""
    return Response("Refused: this request did not come from this page.\n", status, media_type="text/plain")


def digest(text: str) -> bytes:
    """What is kept of a secret, so that finding one in memory finds no secret."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
