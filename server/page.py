"""The page: studies, rounds, hospitals and their epsilons, for a browser and for Prometheus. It only reads.

What it shows comes from the journals and from the studies' states: no update, no key, no record. On a loopback address
it asks for no token; anywhere else it speaks TLS with the coordinator's certificate and asks for the viewers' token.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server import logs
from server.expiry import expiries as find_expiries
from server.follow import Follow
from server.metrics import exposition
from server.settings import Settings
from server.standing import Standing, clock, first_metrics
from server.studies import Studies, StudyStatus
from shared_models.certificates import Expiry
from shared_models.curves import Chart, Points, chart
from shared_models.errors import ConfigError, FederationError, UnknownStudyError
from shared_models.listening import address, brief_server, is_loopback, listen, names_loopback, read_token

log = logging.getLogger("konsil.page")

WEB = Path(__file__).with_name("web")
LONGEST_FORM = 4096  # bytes
SESSION_S = 12 * 3600.0
MOST_SESSIONS = 1000
SHOWN_ROUNDS = 15
OPEN = frozenset({"/login", "/page.css", "/icon.svg", "/healthz"})  # these say nothing about a study
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}

Scope = MutableMapping[str, Any]


class Viewers:
    """Who may look: whoever has the token, by header, or by a session that the token opened.

    Args:
        token: None where nobody has to show one.
    """

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else _digest(token)
        self._sessions: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def right(self, token: str) -> bool:
        """Whether this is the token; takes as long whatever is wrong with it."""
        return self._token is None or hmac.compare_digest(_digest(token), self._token)

    def open_session(self) -> str:
        """A new session; of too many the oldest ends."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            now = time.monotonic()
            self._sessions = {key: end for key, end in self._sessions.items() if end > now}
            while len(self._sessions) >= MOST_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[_digest(name)] = now + SESSION_S
        return name

    def close_session(self, name: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_digest(name), None)

    def may(self, request: Request, cookie: str) -> bool:
        """Whether a request may see studies."""
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        if self._token is None or (kind.lower() == "bearer" and self.right(shown.strip())):
            return True
        with self._lock:
            return self._sessions.get(_digest(request.cookies.get(cookie, "")), 0.0) > time.monotonic()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """In front of the page: refuses whom it is not for, and writes what every answer carries.

    Args:
        app: The page.
        viewers: Who may look.
        cookie: Name of the sessions' cookie.
        loopback: Whether requests must name this machine as their host: a foreign page whose name was made to point
            here (DNS rebinding) names its own.
    """

    def __init__(self, app: FastAPI, viewers: Viewers, *, cookie: str, loopback: bool) -> None:
        self._app, self._viewers, self._cookie, self._loopback = app, viewers, cookie, loopback

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """One request, as ASGI has it."""
        with logs.request() as request_id:

            async def send_with_headers(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    extra = {**HEADERS, "x-request-id": request_id}
                    message["headers"] = [
                        *((name, value) for name, value in message["headers"] if name.decode("latin-1") not in extra),
                        *((name.encode("ascii"), value.encode("ascii")) for name, value in extra.items()),
                    ]
                await send(message)

            request = Request(scope)
            refusal = self._refusal(request)
            if refusal is not None:
                log.warning("%s %r: refused with %d", request.method, request.url.path, refusal.status_code)
            await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if self._loopback and not names_loopback(request.headers.get("host", "")):
            return _problem(421, "this page is only for the machine that it runs on")
        path = request.url.path
        if path in OPEN or self._viewers.may(request, self._cookie):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", status_code=303)
        refusal = _problem(401, "show the viewers' token")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal


def _problem(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def make_app(
    studies: Studies, viewers: Viewers, expiries: Callable[[], Iterable[Expiry]], *, cookie: str, secure: bool
) -> FastAPI:
    """The page's application, without its guard.

    Args:
        studies: What is shown.
        viewers: Whose sessions to open.
        expiries: What runs out, for the metrics.
        cookie: Name of the sessions' cookie.
        secure: Whether the cookie may only travel over TLS.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their documents load scripts from elsewhere
    follow, web = Follow(studies), _templates()

    def html(template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(web.get_template(template).render(**values), status_code=status)

    @app.exception_handler(FederationError)
    def known(request: Request, error: FederationError) -> Response:
        status = 404 if isinstance(error, UnknownStudyError) else 503
        if status == 503:
            log.warning("%s %r: %s (%s)", request.method, request.url.path, error, error.hint)
        if request.url.path.startswith("/studies/"):
            return html("problem.html", status, problem=str(error))
        return _problem(status, str(error))

    @app.get("/healthz")
    def healthz() -> Response:
        studies.all()  # raises where the database is away
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        text, content_type = exposition(follow, expiries, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    def listed() -> dict[str, Any]:
        lines = [_line(follow, status) for status in studies.all()]
        return {"version": _version(lines), "studies": lines}

    @app.get("/api/studies")
    def api_studies() -> Response:
        return JSONResponse(listed())

    @app.get("/api/studies/{name}")
    def api_study(name: str) -> Response:
        status = studies.show(name)
        with follow.study(status) as progress:
            return JSONResponse(_whole(status, progress))

    @app.get("/api/studies/{name}/version")
    def api_version(name: str) -> Response:
        status = studies.show(name)
        with follow.study(status) as progress:
            return JSONResponse({"version": _version(_summary(status, progress), progress.events)})

    @app.get("/api/studies/{name}/events")
    def api_events(name: str, after: int = 0) -> Response:
        try:
            events, offset = follow.events(name, max(after, 0))
        except ValueError:
            return _problem(400, "no event begins there: use the `next` of an earlier answer")
        return JSONResponse({"events": events, "next": offset})

    @app.get("/")
    def index() -> Response:
        return html("index.html", **listed())

    @app.get("/studies/{name}")
    def study(name: str) -> Response:
        status = studies.show(name)
        with follow.study(status) as progress:
            shown, drawn = _whole(status, progress, rounds=SHOWN_ROUNDS), _drawn(status, progress)
        return html("study.html", **shown, plan=status.row.plan, charts=drawn)

    @app.get("/login")
    def login() -> Response:
        return html("login.html", wrong=False)

    @app.post("/login")
    async def log_in(request: Request) -> Response:
        form = b""
        async for piece in request.stream():
            form += piece
            if len(form) > LONGEST_FORM:
                return _problem(413, "too long for a token")
        (token, *_) = parse_qs(form.decode("utf-8", "replace")).get("token", [""])
        if not viewers.right(token.strip()):
            log.warning("a wrong token")
            await asyncio.sleep(0.5)
            return html("login.html", 401, wrong=True)
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(
            cookie, viewers.open_session(), max_age=int(SESSION_S), secure=secure, httponly=True, samesite="strict"
        )
        return answer

    @app.post("/logout")
    def log_out(request: Request) -> Response:
        viewers.close_session(request.cookies.get(cookie, ""))
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(cookie, secure=secure, httponly=True, samesite="strict")
        return answer

    for name in ("page.css", "page.js", "icon.svg"):
        app.get(f"/{name}")(_file(WEB / name))
    return app


def _file(path: Path) -> Any:
    async def send() -> FileResponse:
        return FileResponse(path)

    return send


def _templates() -> Environment:
    web = Environment(loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    web.filters |= {"when": _when, "clock": clock, "duration": _duration}
    return web


def _when(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"


def _duration(seconds: float) -> str:
    """As short as a person would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _version(*shown: Any) -> str:
    """A digest of what is shown, by which a browser knows whether anything has changed."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def _line(follow: Follow, status: StudyStatus) -> dict[str, Any]:
    """A study in the list of all."""
    with follow.study(status) as progress:
        return _summary(status, progress)


def _summary(status: StudyStatus, progress: Standing) -> dict[str, Any]:
    row, last = status.row, progress.history[-1] if progress.history else None
    return {
        "name": row.name,
        "state": row.state.value,
        "reason": progress.problem or row.reason,
        "position": status.position,
        "rounds_done": row.rounds_done,
        "rounds": row.plan.rounds,
        "epsilon": progress.epsilon,
        "epsilon_limit": row.plan.privacy.epsilon,
        "hospitals": len(progress.hospitals),
        "answered": len(last.answered) if last else None,
        "left_s": None if row.state.over else progress.left_s,
        "submitted_at": row.submitted_at,
        "changed_at": row.changed_at,
    }


def _whole(status: StudyStatus, progress: Standing, *, rounds: int | None = None) -> dict[str, Any]:
    """All that the page says of one study; of its rounds perhaps only the newest."""
    summary = _summary(status, progress)
    return {
        "version": _version(summary, progress.events),
        "study": summary,
        "plan_digest": status.row.plan.digest(),
        "hospitals": {
            name: {
                "state": seen.state,
                "public_size": seen.public_size,
                "last_round": seen.last_round,
                "rounds": seen.rounds,
                "epsilon_enforced": seen.epsilon,
                "stated": dict(seen.stated) if seen.stated else None,
                "dropped": dict(seen.dropped),
                "left_out": seen.left_out,
                "set_aside": seen.set_aside,
            }
            for name, seen in sorted(progress.hospitals.items())
        },
        "released": dict(progress.released) if progress.released else None,
        "bytes_up": progress.bytes_up,
        "attempts_failed": {
            "charged": progress.failed_attempts[True],
            "not_charged": progress.failed_attempts[False],
        },
        "history": [seen._asdict() for seen in progress.history[-rounds if rounds else None :]],
        "recent": [{"at": told.at, "text": told.text} for told in reversed(progress.recent) if not told.minor],
    }


def _drawn(status: StudyStatus, progress: Standing) -> list[Chart]:
    """The curves of a study, those that have anything to show."""
    plan, history = status.row.plan, progress.history
    if not history:
        return []
    epsilons: dict[str, list[tuple[float, float]]] = {}
    released: dict[str, list[tuple[float, float]]] = {}
    for seen in history:
        for name, value in seen.epsilons.items():
            epsilons.setdefault(name, []).append((seen.number, value))
        for name, value in first_metrics(seen.released or {}).items():
            released.setdefault(name, []).append((seen.number, value))
    seconds: dict[str, Points] = {"seconds": [(seen.number, seen.seconds) for seen in history]}
    answered: dict[str, Points] = {"hospitals": [(seen.number, len(seen.answered)) for seen in history]}
    known, limit = len(history[-1].answered) + len(history[-1].missing), ("the plan's limit", plan.privacy.epsilon)
    drawn = [chart("Epsilon enforced, by hospital", epsilons, last=plan.rounds, limit=limit)]
    if released:
        drawn.append(chart("Released metrics, noised", released, last=plan.rounds, full=1))
    drawn.append(chart("Seconds per round", seconds, last=plan.rounds))
    drawn.append(chart("Hospitals in the sum", answered, last=plan.rounds, full=known, whole=True))
    return drawn


_MAKE_TOKEN = "Run: (umask 077; openssl rand -hex 32 > FILE), and name it as [page] token_file."  # noqa: S105 - no token


@contextmanager
def serving(settings: Settings, studies: Studies) -> Iterator[None]:
    """Serve the page while the context is open; without ``[page]`` in the settings, nothing.

    Raises:
        ConfigError: The port is in use, or the address is not loopback and there is no token file.
        IdentityError: The token file cannot be used.
    """
    if settings.page is None:
        yield
        return
    page = settings.page
    loopback = is_loopback(page.host)
    if not loopback and page.token_file is None:
        raise ConfigError(f"the page would be open to everybody who reaches {page.host}", hint=_MAKE_TOKEN)
    viewers = Viewers(None if page.token_file is None else read_token(page.token_file, hint=_MAKE_TOKEN))
    cookie = "konsil" if loopback else "__Host-konsil"  # the prefix keeps other hosts from setting it
    app = make_app(studies, viewers, partial(find_expiries, settings), cookie=cookie, secure=not loopback)
    tls = None if loopback else (settings.tls.certificate, settings.tls.key)
    guard = Guard(app, viewers, cookie=cookie, loopback=loopback)
    server = brief_server(guard, tls=tls, hint="Check [tls] in the settings.")
    with listen(page.host, page.port, hint="Stop what uses the port, or choose another in [page].") as listener:
        thread = threading.Thread(target=server.run, args=([listener],), name="page", daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise ConfigError("the page did not start", hint="See the log above.")
            time.sleep(0.01)
        log.info("the page: %s://%s", "http" if loopback else "https", address(page.host, page.port))
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(timeout=10)
