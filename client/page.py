"""The hospital's page, for the steward's browser on this machine: what waits, what it costs, what was spent, what left.

It listens on loopback, where the steward logs in with a local password or with a client certificate, and it runs in a
process of its own. It does what the commands do, by their own functions; everything is drawn here, and no script is
needed.
"""

import hmac
import logging
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from uvicorn import Server

from client.beside import Told
from client.consent import LONGEST_REASON, Consents
from client.decide import confirm_digest, find, sign_and_keep, weigh
from client.desk import Desk, asks, minute, seconds
from client.disclosure import Facts, facts_digest, in_words, named_only
from client.password import Door, read_password
from client.sessions import SESSION_S, Guard, Sessions, digest
from client.settings import PageSettings, Settings
from client.stewards import Shown, look_at
from client.words import LANGUAGES, WEB, preferred, words
from shared_models.errors import FederationError, IdentityError
from shared_models.listening import brief_server, listen
from shared_models.software import software_digest

log = logging.getLogger("konsil.hospital")

LONGEST_FORM = 16_384  # bytes
LANGUAGE = "konsil-language"
FIRST = ("purpose", "again", "price", "left", "leaves", "patients", "mechanism")  # what a decision rests on
PATH = re.compile(r"/(studies/[a-z0-9][a-z0-9-]{0,63}|budget|egress|records|health|login)?")


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP's.
        key: Of the sentence that says why.
    """

    def __init__(self, status: int, key: str) -> None:
        super().__init__(key)
        self.status, self.key = status, key


class Sheets:
    """Pages as HTML, in the language that the browser wants.

    Args:
        hospital: Its name.
    """

    def __init__(self, hospital: str) -> None:
        self._web = Environment(
            loader=FileSystemLoader(WEB),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._web.filters |= {"minute": minute, "seconds": seconds}
        self._web.globals |= {"hospital": hospital, "languages": LANGUAGES}

    def __call__(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """One page."""
        language = words(request.cookies.get(LANGUAGE) or preferred(request.headers.get("accept-language", "")))
        shown = {"t": language, "path": request.url.path, "session": request.state.session}
        return HTMLResponse(self._web.get_template(template).render(**shown, **values), status_code=status)


class Entrance:
    """What lets in whom; and what it leaves with the browser.

    Args:
        desk: Knows the settings.
        sessions: Who is logged in.
        cookie: Name of the sessions' cookie.
    """

    def __init__(self, desk: Desk, sessions: Sessions, cookie: str) -> None:
        self._desk, self.sessions, self.cookie = desk, sessions, cookie

    def password(self) -> bytes:
        """A digest of what the password is kept as; of nothing where none is set or the file cannot be used."""
        try:
            return digest(repr(read_password(self._desk.settings().state)))
        except FederationError:
            return digest("")

    def certificate(self, request: Request) -> Shown | None:
        """What a browser has shown; None where it showed nothing, or the settings ask for nothing."""
        shown: bytes | None = request.state.certificate
        try:
            page = self._desk.settings().page
        except FederationError:
            return None
        return None if shown is None or page is None or page.tls is None else look_at(shown, page.tls)

    def proofs(self, request: Request) -> list[bytes]:
        """What lets in whoever sends this request; see ``Session``."""
        shown = self.certificate(request)
        return [self.password(), *([shown.proof] if shown is not None and not shown.problem else [])]

    def let_in(self, request: Request, proof: bytes, by: str) -> Response:
        """Begin a session."""
        log.info("a login at the page by %s", by)
        answer = RedirectResponse("/", status_code=303)
        name, secure = self.sessions.begin(proof, by), request.url.scheme == "https"
        answer.set_cookie(self.cookie, name, max_age=int(SESSION_S), httponly=True, samesite="strict", secure=secure)
        return answer


def make_app(desk: Desk, entrance: Entrance) -> FastAPI:
    """The page's application, without its guard.

    Args:
        desk: What is shown.
        entrance: Who is let in.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their documents load scripts from elsewhere
    html = Sheets(desk.settings().name)
    _add_errors(app, html)
    _add_login(app, html, desk, entrance)
    _add_decisions(app, html, desk)
    _add_reading(app, html, desk)
    for name in ("page.css", "page.js", "icon.svg"):
        app.get(f"/{name}")(_file(WEB / name))
    return app


def _add_errors(app: FastAPI, html: Sheets) -> None:
    """What is said when a page cannot be shown: never an error's own text."""

    def problem(request: Request, status: int, key: str) -> Response:
        return html(request, "problem.html", status, problem=key)

    @app.exception_handler(FederationError)
    def known(request: Request, error: FederationError) -> Response:
        log.warning("the page cannot be shown: %s", error.code)  # a text may quote a record
        return problem(request, 503, f"code.{error.code}")

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> Response:
        return problem(request, error.status, error.key)

    @app.exception_handler(HTTPException)
    def missing(request: Request, error: HTTPException) -> Response:
        return problem(request, error.status_code, "problem.missing")

    @app.exception_handler(Exception)
    def failed(request: Request, _: Exception) -> Response:
        return problem(request, 500, "problem.failed")


def _add_login(app: FastAPI, html: Sheets, desk: Desk, entrance: Entrance) -> None:
    """In, out, and the language."""
    door = Door()

    def login_page(request: Request, status: int = 200, *, wrong: bool = False) -> Response:
        settings = desk.settings()
        values = {
            "unset": read_password(settings.state) is None,
            "wrong": wrong,
            "certificates": settings.page is not None and settings.page.tls is not None,
            "shown": entrance.certificate(request),
        }
        return html(request, "login.html", status, wait=int(door.wait_s() + 0.999), **values)

    @app.get("/login")
    def login(request: Request) -> Response:
        return login_page(request)

    @app.post("/login")
    async def log_in(request: Request) -> Response:
        form = await _form(request, logged_in=False)
        return await run_in_threadpool(entered, request, form.get("password", ""))

    def entered(request: Request, password: str) -> Response:
        kept = read_password(desk.settings().state)
        if door.wait_s() > 0:
            return login_page(request, 429)
        if kept is None or not door.opens(kept, password):
            log.warning("a wrong password for the page")
            return login_page(request, 401, wrong=True)
        return entrance.let_in(request, entrance.password(), "password")

    @app.post("/login/certificate")
    async def log_in_by_certificate(request: Request) -> Response:
        await _form(request, logged_in=False)
        return await run_in_threadpool(certified, request)

    def certified(request: Request) -> Response:
        shown = entrance.certificate(request)
        if shown is None or shown.problem:
            log.warning("a login without a certificate that opens the page: %s", shown.problem if shown else "none")
            return login_page(request, 403)
        return entrance.let_in(request, shown.proof, f"certificate {shown.proof.hex()[:16]}")

    @app.post("/logout")
    async def log_out(request: Request) -> Response:
        await _form(request)
        entrance.sessions.end(request.cookies.get(entrance.cookie, ""))
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(entrance.cookie, httponly=True, samesite="strict")
        return answer

    @app.post("/language")
    async def language(request: Request) -> Response:
        form = await _form(request, logged_in=False)
        back = form.get("back", "")
        answer = RedirectResponse(back if PATH.fullmatch(back) else "/", status_code=303)
        if form.get("to") in LANGUAGES:
            answer.set_cookie(LANGUAGE, form["to"], max_age=365 * 86_400, httponly=True, samesite="strict")
        return answer


def _add_decisions(app: FastAPI, html: Sheets, desk: Desk) -> None:
    """One study, and the steward's yes or no to it."""
    deciding = threading.Lock()

    @app.get("/studies/{name}")
    def study(request: Request, name: str) -> Response:
        return show(request, name)

    def show(request: Request, name: str, status: int = 200, problem: str = "", reason: str = "") -> Response:
        settings = desk.settings()
        listed = desk.study(settings, name)
        if listed is None:
            raise RefusedError(404, "problem.missing")
        facts, code = _facts(settings, name) if asks(listed) else (None, "")
        kept = Consents(settings.state).proposed(name)
        values = {
            "listed": listed,
            "facts": _ordered(facts or (named_only(kept.plan) if kept else [])),
            "seen": facts_digest(facts) if facts else "",
            "code": code,
            "decides": asks(listed),
            "problem": problem,
            "reason": reason,
        }
        return html(request, "study.html", status, in_words=in_words, longest=LONGEST_REASON, **values)

    @app.post("/studies/{name}/approve")
    async def approve(request: Request, name: str) -> Response:
        form = await _form(request)
        return await run_in_threadpool(approved, request, name, form.get("digest", ""), form.get("seen", ""))

    def approved(request: Request, name: str, digest: str, seen: str) -> Response:
        settings = desk.settings()
        with deciding:
            try:
                weighed = weigh(settings, name)
                confirm_digest(weighed.proposal, digest)
            except FederationError as error:
                log.warning("study %r was not approved on the page: %s", name, error.code)
                return show(request, name, 409, "study.changed")
            if not hmac.compare_digest(facts_digest(weighed.facts).encode(), seen.encode()):
                return show(request, name, 409, "study.changed")
            sign_and_keep(settings, weighed)
        by = request.state.session.by
        log.info("study %s was approved on the page by %s: plan %s", name, by, weighed.proposal.plan_digest)
        return RedirectResponse(f"/studies/{name}", status_code=303)

    @app.post("/studies/{name}/refuse")
    async def refuse(request: Request, name: str) -> Response:
        form = await _form(request)
        return await run_in_threadpool(turned_down, request, name, form.get("digest", ""), form.get("reason", ""))

    def turned_down(request: Request, name: str, digest: str, reason: str) -> Response:
        settings, reason = desk.settings(), reason.strip()
        if not reason or len(reason) > LONGEST_REASON:
            return show(request, name, 422, "study.no-reason", reason)
        with deciding:
            try:
                proposal = find(settings, name)
                confirm_digest(proposal, digest)
            except FederationError:
                return show(request, name, 409, "study.changed", reason)
            Consents(settings.state).refuse(proposal, reason)
        log.info("study %s was refused on the page by %s", name, request.state.session.by)
        return RedirectResponse(f"/studies/{name}", status_code=303)


def _add_reading(app: FastAPI, html: Sheets, desk: Desk) -> None:
    """What is only looked at; and checks of records and machine, which change nothing either."""

    @app.get("/")
    def studies(request: Request) -> Response:
        return html(request, "studies.html", **desk.studies(desk.settings()))

    @app.get("/budget")
    def budget(request: Request) -> Response:
        return html(request, "budget.html", **desk.budget(desk.settings()))

    @app.get("/egress")
    def egress(request: Request) -> Response:
        return html(request, "egress.html", **desk.egress(desk.settings()))

    @app.get("/records")
    def records(request: Request) -> Response:
        count, code = desk.opt_outs(settings := desk.settings())
        listed = settings.opt_out is not None
        return html(request, "records.html", checked=desk.checked, count=count, code=code, listed=listed)

    @app.post("/records")
    async def check(request: Request) -> Response:
        await _form(request)
        await run_in_threadpool(lambda: desk.check_records(desk.settings()))
        return RedirectResponse("/records", status_code=303)

    @app.get("/health")
    def health(request: Request) -> Response:
        checks = desk.health(desk.settings())
        return html(request, "health.html", checks=checks, examined=desk.examined, now=minute(time.time()))

    @app.post("/health")
    async def doctor(request: Request) -> Response:
        await _form(request)
        await run_in_threadpool(lambda: desk.examine(desk.settings()))
        return RedirectResponse("/health", status_code=303)


def _facts(settings: Settings, name: str) -> tuple[Facts | None, str]:
    """What there is to decide on, or the code of why it cannot be approved."""
    try:
        return weigh(settings, name).facts, ""
    except FederationError as error:
        return None, error.code


def _ordered(facts: Facts) -> Facts:
    return sorted(facts, key=lambda fact: FIRST.index(fact[0]) if fact[0] in FIRST else len(FIRST))


async def _form(request: Request, *, logged_in: bool = True) -> dict[str, str]:
    """The fields of a form of ours.

    Raises:
        RefusedError: It is too long, or lacks the session's token.
    """
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_FORM:
            raise RefusedError(413, "problem.refused")
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=20)
    except ValueError:
        raise RefusedError(413, "problem.refused") from None
    form = {name: values[0] for name, values in fields.items()}
    session = request.state.session
    right = session is not None and hmac.compare_digest(form.get("token", "").encode(), session.token.encode())
    if logged_in and not right:
        raise RefusedError(403, "problem.refused")
    return form


def _file(path: Path) -> Any:
    async def send() -> FileResponse:
        return FileResponse(path)

    return send


def guarded(settings_file: Path, told: Told | None = None) -> Guard:
    """The page behind what keeps others out.

    Args:
        settings_file: Read again for every page.
        told: What the daemon says of its connection.

    Raises:
        ConfigError: The settings cannot be used.
    """
    software_digest()  # of the code that was loaded, not of what an update puts in its place later
    desk, sessions = Desk(settings_file, told), Sessions()
    page = desk.settings().page
    cookie = f"konsil-hospital-{page.port if page else 0}"  # cookies are a host's, whatever the port
    entrance = Entrance(desk, sessions, cookie)
    app = make_app(desk, entrance)
    return Guard(app, sessions, cookie=cookie, scheme=page.scheme if page else "http", proofs=entrance.proofs)


def page_server(settings_file: Path, page: PageSettings, told: Told | None = None) -> Server:
    """What serves the page, over TLS where the settings have it.

    Raises:
        ConfigError: The settings cannot be used.
        IdentityError: A TLS file cannot be used, or the page's key is open to others.
    """
    guard, tls = guarded(settings_file, told), page.tls
    if tls is None:
        return brief_server(guard, tls=None, hint="")
    if tls.key.exists() and tls.key.stat().st_mode & 0o077:
        raise IdentityError(f"{tls.key} is open to others", hint=f"Run: chmod 600 {tls.key}")
    hint = "Run konsil-hospital page-certificate hospital.toml, or check [page.tls]."
    return brief_server(guard, tls=(tls.certificate, tls.key), hint=hint, clients=tls.stewards)


def serve_page(settings_file: Path, page: PageSettings, listener: socket.socket | None = None) -> None:
    """Serve the page until SIGTERM, or until the daemon that handed on its socket has ended.

    Raises:
        ConfigError: The settings cannot be used, or the port is in use.
        IdentityError: A TLS file cannot be used.
    """
    told, port = Told(), page.port
    server = page_server(settings_file, page, told)
    beside = listener is not None
    with listener or listen("127.0.0.1", port, hint="Stop what uses it, or choose another: [page] port.") as bound:
        if beside:
            threading.Thread(target=_until_daemon_ends, args=(told, server), name="daemon", daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        server.run(sockets=[bound])


def _until_daemon_ends(told: Told, server: Any) -> None:
    told.listen(sys.stdin.buffer)
    server.should_exit = True
