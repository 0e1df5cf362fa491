"""The page: who may look, what it shows, and that nothing but what the journal holds can be got from it."""

import json
import logging
import re
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.x509 import load_pem_x509_certificate
from fastapi import Request
from prometheus_client.parser import text_string_to_metric_families

from server.coordinator import coordinating
from server.demo import free_port
from server.evidence import RECEIPTS
from server.page import SESSION_S, Viewers, serving
from server.pki import Authority
from server.settings import PageSettings
from shared_models.errors import ConfigError, FederationError, IdentityError
from shared_models.listening import read_token
from tests.link import Keys
from tests.markup import Markup
from tests.server.conftest import HOSTILE, WAITING, Seen

TOKEN = "0123456789abcdef" * 4
ANSWERS = (
    "/",
    "/studies/breast-cancer",
    f"/studies/{WAITING}",
    "/api/studies",
    "/api/studies/breast-cancer",
    "/api/studies/breast-cancer/version",
    "/api/studies/breast-cancer/events",
    f"/api/studies/{WAITING}",
    f"/api/studies/{WAITING}/events",
    "/metrics",
    "/healthz",
    "/page.js",
    "/page.css",
    "/icon.svg",
    "/login",
)
HTML = {"accept": "text/html"}

Open = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture
def opened(seen: Seen) -> Open:
    """Serve the page with some settings, and give a client that trusts nothing but what it is told."""

    @contextmanager
    def opening(
        *, host: str = "127.0.0.1", token_file: Path | None = None, keys: Keys | None = None
    ) -> Iterator[httpx.Client]:
        page = PageSettings(host=host, port=free_port(), token_file=token_file)
        settings = seen.settings.model_copy(update={"page": page} | ({"tls": keys.coordinator().tls} if keys else {}))
        url, verify = f"http://127.0.0.1:{page.port}", ssl.create_default_context()
        if keys is not None:
            url, verify = f"https://127.0.0.1:{page.port}", ssl.create_default_context(cafile=settings.tls.ca)
        client = httpx.Client(base_url=url, verify=verify, trust_env=False, timeout=60)
        with seen.studies() as studies, serving(settings, studies), client:
            yield client

    return opening


@pytest.fixture
def client(opened: Open) -> Iterator[httpx.Client]:
    """The page on loopback, without a token."""
    with opened() as client:
        yield client


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """The viewers' token, as an operator keeps it."""
    path = tmp_path / "viewers.token"
    path.write_text(f"{TOKEN}\n", encoding="ascii")
    path.chmod(0o600)
    return path


# what it shows


def test_it_shows_what_the_journal_tells(seen: Seen, client: httpx.Client) -> None:
    """Rounds, hospitals, drop-outs, released metrics and epsilons are those of the journal."""
    rounds, (finished,) = seen.federation.events("round"), seen.federation.events("finished")

    told = client.get("/api/studies/breast-cancer").json()

    assert told["version"] == client.get("/api/studies/breast-cancer/version").json()["version"]
    assert f'data-version="{told["version"]}"' in client.get("/studies/breast-cancer").text

    assert told["study"]["state"] == "finished"
    assert (told["study"]["rounds_done"], told["study"]["rounds"]) == (4, 4)
    assert [seen["answered"] for seen in told["history"]] == [event["answered"] for event in rounds]
    assert told["released"] == rounds[-1]["metrics_released"] is not None
    assert set(told["hospitals"]) == set(seen.federation.names)
    for name, hospital in told["hospitals"].items():
        assert hospital["stated"] == finished["hospitals"][name]
        assert hospital["epsilon_enforced"] == finished["hospitals"][name]["epsilon_filter"]
        assert hospital["dropped"] == ({"train": 1} if name == "hospital-4" else {})
    sums = seen.federation.events("sum")
    assert told["bytes_up"] == sum(event["bytes_up"] * len(event["answered"]) for event in sums)


def test_the_study_that_waits_says_why(client: httpx.Client) -> None:
    """Of every study the state is shown, also of those that have not begun."""
    found = {study["name"]: study for study in client.get("/api/studies").json()["studies"]}

    assert {name: study["state"] for name, study in found.items()} == {"breast-cancer": "finished", WAITING: "pending"}
    assert found[WAITING]["rounds_done"] == 0


def test_the_events_come_in_pieces_and_none_is_lost(
    seen: Seen, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for what comes after `next`, again and again, has the journal."""
    monkeypatch.setattr("server.follow.PIECE", 4096)
    journal = (seen.federation.folder / "study" / "events.jsonl").read_text("utf-8").splitlines()

    events: list[Any] = []
    offset = 0
    while piece := (answer := client.get(f"/api/studies/breast-cancer/events?after={offset}").json())["events"]:
        events, offset = events + piece, answer["next"]

    assert events == [json.loads(line) for line in journal]
    assert client.get("/api/studies/breast-cancer/events?after=7").status_code == 400


def test_prometheus_sees_when_certificates_run_out(opened: Open, tmp_path: Path, token_file: Path) -> None:
    """Unix time by holder, as the files are at the moment: a renewal shows at the next scrape."""
    keys = Keys(tmp_path / "keys")
    with opened(host="0.0.0.0", token_file=token_file, keys=keys) as client:  # noqa: S104 - meant
        client.headers["authorization"] = f"Bearer {TOKEN}"
        for authority in (keys.authority, Authority(tmp_path / "again", valid_for=timedelta(days=7))):
            keys.coordinator_certificate(authority)
            samples = {
                sample.labels["holder"]: sample.value
                for family in text_string_to_metric_families(client.get("/metrics").text)
                for sample in family.samples
                if sample.name == "konsil_certificate_expiry_timestamp_seconds"
            }

            until = load_pem_x509_certificate(keys.coordinator().tls.certificate.read_bytes()).not_valid_after_utc
            assert samples["coordinator"] == until.timestamp()
            assert "authority" in samples


def test_what_is_not_there_is_said_so(client: httpx.Client) -> None:
    """In words, without a traceback, to browsers as a page."""
    shown, told = client.get("/studies/nothing"), client.get("/api/studies/nothing")

    assert (shown.status_code, told.status_code) == (404, 404)
    assert "there is no study nothing" in shown.text
    assert told.json() == {"error": "there is no study nothing"}


def test_prometheus_reads_the_journals_figures(seen: Seen, client: httpx.Client) -> None:
    """Every figure that a dashboard would be built on, by Prometheus's own parser."""
    samples = {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }

    rounds, (finished,) = seen.federation.events("round"), seen.federation.events("finished")
    study = "breast-cancer"
    assert samples["konsil_study_rounds_done", study] == samples["konsil_study_rounds_planned", study] == 4
    assert samples["konsil_study_state", "finished", study] == 1
    assert samples["konsil_study_state", "running", study] == 0
    assert samples["konsil_study_state", "pending", WAITING] == 1
    assert samples["konsil_round_seconds_count", study] == 4
    assert samples["konsil_round_seconds_sum", study] == pytest.approx(sum(event["seconds"] for event in rounds))
    assert samples["konsil_stage_seconds_count", "train", "train", study] == 4
    assert samples["konsil_stage_seconds_count", "evaluate", "unmask", study] == 2
    assert samples["konsil_dropouts_total", "hospital-4", "train", study] == 1
    assert samples["konsil_rounds_answered_total", "hospital-4", study] == 3
    assert samples["konsil_set_aside_total", "hospital-4", study] == 0
    assert samples["konsil_attempts_failed_total", "true", study] == 0
    assert samples["konsil_vector_bytes_up_total", study] > 15 * 4220
    for name, stated in finished["hospitals"].items():
        assert samples["konsil_epsilon_enforced", name, study] == stated["epsilon_filter"]
        assert samples["konsil_epsilon_stated", stated["accountant"], "0.0003", name, study] == stated["epsilon"]
    for metric, value in rounds[-1]["metrics_released"].items():
        assert samples["konsil_released_metric", metric, study] == value


# what it never does


@pytest.mark.parametrize(
    "path", ["/", f"/studies/{WAITING}", "/studies/breast-cancer", "/login", "/studies/%3Cscript%3E"]
)
def test_hostile_words_stay_words(client: httpx.Client, path: str) -> None:
    """A purpose or a reason is free text: it opens no tag, ends none, and calls no template."""
    text = client.get(path).text

    tags = Markup(text).tags

    assert [attributes.get("src") for tag, attributes in tags if tag == "script"] in ([], ["/page.js"])
    assert [(tag, name) for tag, attributes in tags for name in attributes if name.startswith(("on", "style"))] == []
    assert [attributes for tag, attributes in tags if tag == "img" and attributes["src"] != "/icon.svg"] == []
    assert text.count("</main>") == 1
    if WAITING in path:
        assert "&lt;script&gt;window.hacked = 1&lt;/script&gt;" in text
        assert "{{ 7 * 7 }}" in text


@pytest.mark.parametrize("path", ANSWERS)
def test_no_answer_names_another_host(client: httpx.Client, path: str) -> None:
    """Neither for a picture, nor a font, nor a script; and the browser is told to load none."""
    answer = client.get(path)

    assert answer.status_code == 200
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", answer.text)) <= {"http://www.w3.org/2000/svg"}
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("frame-ancestors") == "'none'"
    assert set(policy.values()) == {"'self'"}
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])


def test_no_key_signature_or_record_is_in_any_answer(seen: Seen, client: httpx.Client) -> None:
    """Receipts and keys lie beside the journal; none of them is shown."""
    folder = seen.federation.folder
    receipts = [json.loads(line) for line in (folder / "study" / RECEIPTS).read_text("utf-8").splitlines()]
    secret = set(re.findall(r"[0-9a-f]{64,}", json.dumps(receipts))) - {seen.federation.plan.digest()}
    secret |= {path.read_text("ascii").strip() for path in (folder / "public").glob("*.identity.pub")}
    assert len(secret) > 15

    shown = "".join(client.get(path).text for path in ANSWERS)

    assert [value for value in secret if value in shown] == []
    assert "safetensors" not in client.get("/studies/breast-cancer").text


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", [path for path in ANSWERS if path != "/login"])
def test_nothing_can_be_changed(client: httpx.Client, method: str, path: str) -> None:
    """The page only reads."""
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/web/study.html", "/page.css/../../page.py"])
def test_there_is_nothing_else(client: httpx.Client, path: str) -> None:
    """No generated documents, which would load scripts from elsewhere, and no files of this program."""
    assert client.get(path).status_code == 404


def test_a_database_that_is_away_is_said_so(seen: Seen, client: httpx.Client) -> None:
    """As a 503 that says what is wrong, and the page is there again with the database."""
    database = seen.federation.folder / "coordinator.sqlite"
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE studies RENAME TO away")
        try:
            away = [client.get(path) for path in ("/healthz", "/", "/metrics", "/studies/breast-cancer")]
        finally:
            connection.execute("ALTER TABLE away RENAME TO studies")

    assert [answer.status_code for answer in away] == [503] * 4
    assert str(database) in away[0].json()["error"]
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("broken", ["no json\n", '{"time": 1}\n', "[]\n", None])
def test_one_broken_journal_hides_no_other_study(seen: Seen, client: httpx.Client, broken: str | None) -> None:
    """The page says what is wrong with the one, and shows the rest; mended, it is whole again."""
    path = seen.federation.folder / WAITING / "events.jsonl"
    kept = path.read_bytes()
    try:
        if broken is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_text(broken, encoding="utf-8")
        answers = [client.get(path) for path in ("/", f"/studies/{WAITING}", "/metrics", "/api/studies")]
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(kept)

    assert [answer.status_code for answer in answers] == [200] * 4
    assert all("its journal cannot be read" in answer.text for answer in (answers[0], answers[1], answers[3]))
    assert 'konsil_study_rounds_done{study="breast-cancer"} 4.0' in answers[2].text
    assert "cannot be read" not in client.get(f"/studies/{WAITING}").text


# who may look


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "10.0.0.1",
        "",
        "[::2]:80",
        "evil@localhost",
    ],
)
def test_a_page_of_another_name_that_points_here_gets_nothing(client: httpx.Client, host: str) -> None:
    """DNS rebinding: a foreign page makes its own name mean this machine, and is betrayed by that name."""
    answer = client.get("/api/studies", headers={"host": host})

    assert answer.status_code in {400, 421}
    assert "breast-cancer" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:9", "127.8.8.8", "[::1]:8080", "[::1]"])
def test_this_machine_is_let_in_through_any_port(client: httpx.Client, host: str) -> None:
    """Also through a tunnel, whose port is another."""
    assert client.get("/api/studies", headers={"host": host}).status_code == 200


def test_with_a_token_file_nothing_is_shown_without_the_token(opened: Open, token_file: Path) -> None:
    """Programs get a 401, browsers the form; only what says nothing about studies is open."""
    with opened(token_file=token_file) as client:
        refused = {path: client.get(path) for path in ANSWERS}
        wrong = [
            client.get("/", headers={"authorization": value})
            for value in (f"Bearer {TOKEN[:-1]}", "Bearer", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}{TOKEN}")
        ]
        right = client.get("/api/studies", headers={"authorization": f"Bearer {TOKEN}"})
        browser = client.get("/studies/breast-cancer", headers=HTML)

    open_ = {path for path, answer in refused.items() if answer.status_code == 200}
    assert open_ == {"/login", "/page.css", "/icon.svg", "/healthz"}
    assert {refused[path].status_code for path in set(ANSWERS) - open_} == {401}
    assert {answer.headers["www-authenticate"] for answer in wrong} == {"Bearer"}
    assert {answer.status_code for answer in wrong} == {401}
    assert right.status_code == 200
    assert (browser.status_code, browser.headers["location"]) == (303, "/login")
    assert "breast-cancer" not in "".join(answer.text for answer in [*refused.values(), *wrong, browser])


def test_the_form_opens_a_session_that_ends(opened: Open, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The cookie is no token, no script can read it, no other site sends it; the token itself is in no log."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")
    with opened(token_file=token_file) as client:
        wrong = client.post("/login", data={"token": "guess" * 20})
        entered = client.post("/login", data={"token": TOKEN})
        inside = client.get("/studies/breast-cancer", headers=HTML)
        client.post("/logout")
        cookie = entered.headers["set-cookie"]
        after = client.get("/", headers={"cookie": cookie.split(";")[0]})
        long = client.post("/login", data={"token": "x" * 100_000})

    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    assert entered.status_code == 303
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    assert TOKEN not in cookie
    assert inside.status_code == 200
    assert after.status_code == 401
    assert long.status_code == 413
    assert TOKEN not in caplog.text
    assert "a wrong token" in caplog.text


def test_sessions_run_out_and_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session lasts for hours, not for ever; of too many the oldest goes."""
    monkeypatch.setattr("server.page.MOST_SESSIONS", 3)
    viewers = Viewers(TOKEN)
    names = [viewers.open_session() for _ in range(4)]
    requests = [_request_with(f"konsil={name}") for name in names]

    assert [viewers.may(request, "konsil") for request in requests] == [False, True, True, True]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + SESSION_S + 1)
    assert [viewers.may(request, "konsil") for request in requests] == [False] * 4


def _request_with(cookie: str) -> Request:
    return Request({"type": "http", "headers": [(b"cookie", cookie.encode("ascii"))]})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "coordinator.example.org", "::"])  # noqa: S104 - refused
def test_it_is_never_open_to_others_without_a_token(seen: Seen, host: str) -> None:
    """On any address but loopback it does not start without a token file."""
    settings = seen.settings.model_copy(update={"page": PageSettings(host=host, port=free_port())})

    with seen.studies() as studies, pytest.raises(ConfigError, match="open to everybody"), serving(settings, studies):
        pass


def test_elsewhere_it_speaks_tls_and_asks_for_the_token(opened: Open, token_file: Path, tmp_path: Path) -> None:
    """With the coordinator's certificate; the session's cookie travels over TLS only."""
    with opened(host="0.0.0.0", token_file=token_file, keys=Keys(tmp_path / "keys")) as client:  # noqa: S104 - meant
        refused = client.get("/api/studies")
        entered = client.post("/login", data={"token": TOKEN})
        inside = client.get("/api/studies", headers={"host": "coordinator.example.org"})
        with pytest.raises(httpx.HTTPError), httpx.Client(trust_env=False) as plain:
            plain.get(str(client.base_url).replace("https", "http"))

    assert refused.status_code == 401
    cookie = entered.headers["set-cookie"].lower()
    assert cookie.startswith("__host-konsil=")
    assert "; secure" in cookie
    assert inside.status_code == 200


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_token_file_that_others_can_read_is_refused(token_file: Path, mode: int) -> None:
    """Before anything is served."""
    token_file.chmod(mode)

    with pytest.raises(IdentityError, match="open to others") as caught:
        read_token(token_file, hint="make one")

    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("token", ["", "secret", "x" * 31])
def test_a_token_that_can_be_guessed_is_refused(token_file: Path, token: str) -> None:
    """And so is a file that is not there; the error does not quote the token."""
    token_file.write_text(token, encoding="ascii")

    with pytest.raises(IdentityError, match="shorter than 32 characters") as caught:
        read_token(token_file, hint="make one")

    assert not token or token not in str(caught.value).replace(str(token_file), "")
    with pytest.raises(IdentityError, match="cannot be read"):
        read_token(token_file.with_name("nowhere"), hint="make one")


def test_who_says_nothing_or_says_it_slowly_loses_the_place(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle and half-said requests are ended, too many are not let in, and the page is there for everybody else."""
    monkeypatch.setattr("shared_models.listening.IDLE_S", 0.5)
    monkeypatch.setattr("shared_models.listening.MOST_CONNECTIONS", 20)
    address = ("127.0.0.1", client.base_url.port or 0)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(40)]
        for slow in silent[::2]:
            with suppress(ConnectionError):
                slow.sendall(b"GET / HTTP/1.1\r\nHost: local")

        ended = [_ended(connection) for connection in silent]

        assert ended == [True] * 40
        assert client.get("/healthz").status_code == 200


def _ended(connection: socket.socket) -> bool:
    """Wait until the other side has ended a connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


# the coordinator


def test_a_port_in_use_is_said_so(seen: Seen) -> None:
    """With the address, and before any study goes on."""
    with socket.create_server(("127.0.0.1", 0)) as taken, seen.studies() as studies:
        page = PageSettings(port=taken.getsockname()[1])
        settings = seen.settings.model_copy(update={"page": page})

        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{page.port}"), serving(settings, studies):
            pass


def test_a_coordinator_serves_it_while_it_runs_and_only_then(tmp_path: Path) -> None:
    """The settings' `[page]` is all that it takes."""
    page = PageSettings(port=free_port())
    settings = Keys(tmp_path).coordinator().model_copy(update={"page": page})
    url = f"http://127.0.0.1:{page.port}/api/studies"

    with coordinating(settings):
        running = httpx.get(url, trust_env=False).json()

    assert running["studies"] == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_without_the_setting_there_is_no_page(seen: Seen) -> None:
    """Nothing listens that nobody asked for."""
    with ExitStack() as stack:
        studies = stack.enter_context(seen.studies())
        before = socket_count()
        stack.enter_context(serving(seen.settings, studies))

        assert socket_count() == before


def socket_count() -> int:
    """Sockets that this process holds open."""
    return sum(path.is_socket() for path in Path("/proc/self/fd").iterdir())


def test_an_error_of_ours_is_no_traceback(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """A name that no study can have is unknown, whatever is in it."""
    for name in ("../../etc/passwd", "%00", "a" * 5000, HOSTILE):
        answer = client.get(f"/api/studies/{name}")
        assert answer.status_code in {404, 405}, name
    assert "Traceback" not in caplog.text
    assert issubclass(ConfigError, FederationError)
