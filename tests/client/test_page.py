"""The hospital's page: who gets in, what is shown, and that a yes is exactly the yes of the command line."""

import html
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from client.beside import Told
from client.books import read_budget
from client.cli import app
from client.consent import Consents
from client.decide import weigh
from client.desk import Burning, Desk
from client.disclosure import in_words
from client.password import PASSWORD as PASSWORD_FILE
from client.password import set_password
from client.sessions import IDLE_S, SESSION_S
from client.words import words
from shared_models.approval import verify_approval
from shared_models.errors import ConfigError
from shared_models.identity import load_key, public_bytes
from shared_models.messages import Refusal, Update
from tests.client.steward import PASSWORD, Steward, add_page, serving, visiting
from tests.federation import Federation, change_policy, changed, make_federation, restart_hospitals
from tests.markup import Markup
from tests.rounds.test_a_server_that_lies import Coordinator

HOSPITAL = "hospital-1"
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="hacked=1">"'&</svg></main>{{ 7 * 7 }} {purpose}"""
PAGES = ("/", "/studies/breast-cancer", "/budget", "/egress", "/records", "/health")
CHANGES = ("/studies/breast-cancer/approve", "/studies/breast-cancer/refuse", "/records", "/health", "/logout")
STUDY = "breast-cancer"


def propose(federation: Federation) -> Any:
    """The study is proposed, as a coordinator does it again and again."""
    return Coordinator(federation).propose(HOSPITAL)


@pytest.fixture(autouse=True, scope="module")
def _cheap_passwords() -> Iterator[None]:
    """What one try costs is shown in test_password.py; here it would only cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.password.COST", 16)
        yield


def make_waiting(folder: Path) -> Federation:
    """A federation of three whose study waits at one hospital, which has a page and a list of patients who say no."""
    federation = make_federation(folder, hospitals=3, rounds=2, purpose=HOSTILE)
    change_policy(federation, HOSPITAL, standing_approvals=[])
    file = federation.settings_file(HOSPITAL)
    (file.parent / "no.txt").write_text("# nobody yet\n", encoding="utf-8")
    add_page(file, opt_out="no.txt")
    propose(federation)
    return federation


@pytest.fixture
def waiting(tmp_path: Path) -> Federation:
    """A study that waits, to be decided on."""
    return make_waiting(tmp_path)


@pytest.fixture(scope="module")
def kept_waiting(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A study that waits, on which nothing of what is tried here decides."""
    federation = make_waiting(tmp_path_factory.mktemp("waiting"))
    restart_hospitals()
    return federation


@contextmanager
def at_the_page(federation: Federation, *, logged_in: bool = True, told: Told | None = None) -> Iterator[Steward]:
    """A steward, logged in unless told otherwise."""
    with serving(federation.settings_file(HOSPITAL), told) as address, visiting(address) as steward:
        if logged_in:
            assert steward.log_in().status_code == 303
        yield steward


@pytest.fixture
def steward(waiting: Federation) -> Iterator[Steward]:
    """Logged in at the page of the study that waits."""
    with at_the_page(waiting) as steward:
        yield steward


@pytest.fixture
def bystander(kept_waiting: Federation) -> Iterator[Steward]:
    """Logged in at the page of the study on which nothing decides."""
    with at_the_page(kept_waiting) as steward:
        yield steward
        assert undecided(kept_waiting)


def undecided(federation: Federation) -> bool:
    """Whether nothing was said about the study."""
    consents = Consents(federation.settings(HOSPITAL).state)
    return consents.approved(STUDY) is None and consents.refused(STUDY) is None and len(consents.waiting()) == 1


# who gets in


def test_without_the_password_nothing_is_shown_and_nothing_can_be_done(kept_waiting: Federation) -> None:
    """Every page leads to the form; only what says nothing about the hospital is open."""
    with at_the_page(kept_waiting, logged_in=False) as steward:
        shown = [steward.get(path) for path in (*PAGES, "/nowhere", "/studies/x", "/docs", "/openapi.json")]
        done = [steward.send(path, {"token": "", "reason": "no"}) for path in CHANGES]
        wrong = steward.log_in("a wrong password")
        open_ = [steward.get(path) for path in ("/login", "/page.css", "/page.js", "/icon.svg")]

    assert {(answer.status_code, answer.headers["location"]) for answer in shown + done} == {(303, "/login")}
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    assert {answer.status_code for answer in open_} == {200}
    assert STUDY not in "".join(answer.text for answer in [*shown, *done, wrong, *open_])
    assert undecided(kept_waiting)


def test_the_session_s_cookie_is_for_this_page_alone(
    kept_waiting: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """No script can read it, no other site sends it, it ends; the password is in no answer and in no log."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")
    with at_the_page(kept_waiting, logged_in=False) as steward:
        entered = steward.log_in()
        wrong = steward.log_in("another secret guess")
        pages = [steward.get(path).text for path in PAGES]

    parts = {part.strip().lower() for part in entered.headers["set-cookie"].split(";")}
    assert {"httponly", "samesite=strict", "path=/", f"max-age={SESSION_S:.0f}"} <= parts
    assert "a wrong password for the page" in caplog.text
    for text in (*pages, entered.text, wrong.text, caplog.text):
        assert PASSWORD not in text
        assert "another secret guess" not in text


def test_too_many_guesses_have_to_wait(kept_waiting: Federation) -> None:
    """Also with the right password; and the page says for how long."""
    with at_the_page(kept_waiting, logged_in=False) as steward:
        guesses = [steward.log_in(f"a wrong password {number}").status_code for number in range(4)]
        right = steward.log_in()

    assert guesses == [401, 401, 401, 429]
    assert right.status_code == 429
    assert "Too many wrong passwords. Wait 2 seconds" in right.text


@pytest.mark.parametrize("how", ["idle", "long", "log out", "new password", "password gone"])
def test_a_session_ends(kept_waiting: Federation, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """After a while, by hand, and with the password; a page that only looks whether something changed is no use."""
    clock = [0.0]
    real = time.monotonic
    monkeypatch.setattr("client.sessions.time", SimpleNamespace(monotonic=lambda: real() + clock[0]))
    state = kept_waiting.settings(HOSPITAL).state
    with at_the_page(kept_waiting) as steward:
        cookies = dict(steward.client.cookies)
        match how:
            case "idle":
                clock[0] += IDLE_S - 60
                assert steward.get("/", **{"x-konsil-live": "1"}).status_code == 200
                clock[0] += 120
            case "long":
                for _ in range(int(SESSION_S / IDLE_S * 2) - 1):
                    clock[0] += IDLE_S / 2
                    assert steward.get("/").status_code == 200
                clock[0] += IDLE_S / 2
            case "log out":
                assert steward.send("/logout", steward.fields("/", "/logout")).status_code == 303
                steward.client.cookies.update(cookies)
            case "new password":
                set_password(state, PASSWORD)
            case "password gone":
                (state / PASSWORD_FILE).unlink()

        ended = steward.get("/").status_code
    set_password(state, PASSWORD)

    assert ended == 303


def test_without_a_password_nobody_gets_in_and_the_page_says_how_to_set_one(kept_waiting: Federation) -> None:
    """It is not open until somebody thinks of it."""
    state = kept_waiting.settings(HOSPITAL).state
    (state / PASSWORD_FILE).unlink()
    with at_the_page(kept_waiting, logged_in=False) as steward:
        text = steward.get("/login").text
        tries = [steward.log_in(password).status_code for password in ("", PASSWORD)]
    set_password(state, PASSWORD)

    assert "konsil-hospital page-password hospital.toml" in text
    assert tries == [401, 401]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "", "[::2]:80"]
)
def test_a_page_of_another_name_that_points_here_gets_nothing(
    bystander: Steward, kept_waiting: Federation, host: str
) -> None:
    """DNS rebinding: it is betrayed by its name, also where it says that the form came from itself."""
    fields = bystander.fields(f"/studies/{STUDY}", f"/studies/{STUDY}/approve")

    shown = bystander.get("/", host=host)
    done = bystander.send(f"/studies/{STUDY}/approve", fields, host=host, origin=f"http://{host}")

    assert {shown.status_code, done.status_code} <= {400, 421}
    assert STUDY not in shown.text + done.text
    assert undecided(kept_waiting)


def test_a_tunnel_with_another_port_is_let_in(steward: Steward, waiting: Federation) -> None:
    """The browser names the tunnel's port, in Host and Origin alike."""
    assert steward.get("/", host="localhost:9999").status_code == 200

    answer = steward.approve(STUDY, host="localhost:9999", origin="http://localhost:9999")

    assert answer.status_code == 303
    assert not undecided(waiting)


@pytest.mark.parametrize(
    "origin", ["", "null", "http://evil.example", "http://127.0.0.1", "http://127.0.0.1:1", "https://ORIGIN", "ORIGIN/"]
)
@pytest.mark.parametrize("path", CHANGES)
def test_a_form_from_elsewhere_changes_nothing(kept_waiting: Federation, path: str, origin: str) -> None:
    """Another page of this machine comes with the cookie, because cookies are a host's; and with its own origin."""
    with at_the_page(kept_waiting) as steward:
        fields = {**steward.fields(f"/studies/{STUDY}", f"/studies/{STUDY}/approve"), "reason": "no"}
        origin = origin.replace("ORIGIN", steward.origin.removeprefix("http://"))

        answer = steward.send(path, fields, origin=origin)

        assert answer.status_code == 403
        assert steward.get("/").status_code == 200
        assert undecided(kept_waiting)


@pytest.mark.parametrize("path", CHANGES)
def test_a_form_without_the_session_s_own_token_changes_nothing(kept_waiting: Federation, path: str) -> None:
    """Without one, with a guess, and with that of another session."""
    with at_the_page(kept_waiting) as steward, visiting(steward.origin) as other:
        other.log_in()
        right = {**steward.fields(f"/studies/{STUDY}", f"/studies/{STUDY}/approve"), "reason": "no"}
        foreign = other.fields(f"/studies/{STUDY}", f"/studies/{STUDY}/approve")["token"]

        answers = [steward.send(path, {**right, "token": token}) for token in ("", "x" * 43, "é", foreign)]
        answers.append(steward.send(path, {name: value for name, value in right.items() if name != "token"}))

        assert [answer.status_code for answer in answers] == [403] * 5
        assert steward.get("/").status_code == 200
        assert undecided(kept_waiting)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE"])
def test_looking_changes_nothing(bystander: Steward, kept_waiting: Federation, method: str) -> None:
    """What changes something is a form, sent by POST."""
    answers = [
        bystander.client.request(method, path, headers={"origin": bystander.origin})
        for path in CHANGES
        if path not in {"/records", "/health"}
    ]

    assert {answer.status_code for answer in answers} == {405}
    assert undecided(kept_waiting)


def test_a_form_that_never_ends_is_not_read_to_the_end(bystander: Steward) -> None:
    """Nor one of a million fields."""
    assert bystander.send("/language", {"to": "x" * 100_000}).status_code == 413
    many = {str(number): "" for number in range(100)}
    assert bystander.send("/language", many).status_code == 413


# a yes and a no


def test_one_click_signs_what_the_command_would_sign_and_the_study_begins(
    steward: Steward, waiting: Federation
) -> None:
    """For exactly this plan, at the price that was shown; the hospital takes it up as it takes up the command's."""
    settings = waiting.settings(HOSPITAL)
    price = read_budget(settings).price(waiting.plan)
    assert isinstance(propose(waiting), Refusal)

    answer = steward.approve(STUDY)

    assert (answer.status_code, answer.headers["location"]) == (303, f"/studies/{STUDY}")
    approval = Consents(settings.state).approved(STUDY)
    assert approval is not None
    verify_approval(
        approval, public_bytes(load_key(settings.keys.identity)), study=STUDY, plan_digest=waiting.plan.digest()
    )
    assert (approval.price.epsilon, approval.price.left_after) == (price.study_epsilon_filter, price.left_after)
    assert "You have approved this plan" in steward.get(f"/studies/{STUDY}").text
    assert f"/studies/{STUDY}/approve" not in steward.get(f"/studies/{STUDY}").text
    assert not isinstance(propose(waiting), Refusal)
    assert waiting.ledger(HOSPITAL)[-1].approval == approval.signature


@pytest.mark.parametrize("language", ["en", "zh-Hans"])
def test_what_is_shown_is_what_the_command_shows(bystander: Steward, kept_waiting: Federation, language: str) -> None:
    """Every fact, with every figure, in the reader's language."""
    facts = weigh(kept_waiting.settings(HOSPITAL), STUDY).facts
    terminal = (
        CliRunner().invoke(app, ["approve", str(kept_waiting.settings_file(HOSPITAL)), STUDY], input="n\n").output
    )

    text = html.unescape(bystander.get(f"/studies/{STUDY}", **{"accept-language": language}).text)

    assert f'<html lang="{language}">' in text
    for heading, fact in in_words(facts, words(language)):
        assert heading in text
        assert f"<dd>{fact}</dd>" in text
    for figure in re.findall(r"epsilon (-?[0-9.]+)", " ".join(terminal.split())):
        assert figure in text


@pytest.mark.parametrize("what", ["plan", "policy", "records", "budget"])
def test_what_has_changed_since_it_was_shown_is_shown_again_and_not_approved(waiting: Federation, what: str) -> None:
    """The steward said yes to something else."""
    with at_the_page(waiting) as steward:
        path = f"/studies/{STUDY}"
        fields = steward.fields(path, f"{path}/approve")
        match what:
            case "plan":
                waiting.plan = changed(waiting.plan, rounds=1)
                propose(waiting)
            case "policy":
                change_policy(waiting, HOSPITAL, send_evidence=True, send_checkpoints=True)
                file = waiting.settings_file(HOSPITAL)
                file.write_text(f'control = "127.0.0.1:1"\n{file.read_text("utf-8")}', encoding="utf-8")
            case "records":
                (waiting.settings(HOSPITAL).opt_out or Path()).write_text(f"{patients(waiting)[0]}\n", encoding="utf-8")
            case "budget":
                change_policy(waiting, HOSPITAL, maximum_epsilon_per_study=1e-6)

        answer = steward.send(f"{path}/approve", fields)

        assert answer.status_code == 409
        assert "Something has changed since you opened this page" in answer.text
        assert undecided(waiting)
        if what != "budget":
            again = steward.approve(STUDY)
            assert again.status_code == 303
            assert not undecided(waiting)


@pytest.mark.parametrize("name", ["digest", "seen"])
@pytest.mark.parametrize("value", ["", "0" * 64, "é"])
def test_a_digest_that_was_not_shown_approves_nothing(
    bystander: Steward, kept_waiting: Federation, name: str, value: str
) -> None:
    """Neither the plan's nor that of what was shown can be left out."""
    path = f"/studies/{STUDY}"

    answer = bystander.send(f"{path}/approve", {**bystander.fields(path, f"{path}/approve"), name: value})

    assert answer.status_code == 409
    assert undecided(kept_waiting)


def test_a_refusal_is_for_good_and_its_reason_stays_here(steward: Steward, waiting: Federation) -> None:
    """The coordinator gets the code that it always got; the list on the page and the command's list have the reason."""
    path, reason = f"/studies/{STUDY}", "Nobody asked the <b>ethics committee</b>."
    fields = steward.fields(path, f"{path}/refuse")

    without = steward.send(f"{path}/refuse", {**fields, "reason": "  "})
    assert (without.status_code, undecided(waiting)) == (422, True)
    assert "Say why you refuse." in without.text
    answer = steward.send(f"{path}/refuse", {**fields, "reason": reason})

    assert answer.status_code == 303
    refused = propose(waiting)
    assert isinstance(refused, Refusal)
    assert refused.code == "policy"
    assert reason not in refused.model_dump_json()
    assert reason not in (waiting.settings(HOSPITAL).state / "egress.jsonl").read_text("utf-8")
    assert f"Reason: {html.escape(reason)}" in steward.get(path).text
    listed = CliRunner().invoke(app, ["studies", "--json", str(waiting.settings_file(HOSPITAL))]).output
    assert [(one["status"], one["reason"]) for one in json.loads(listed)] == [("refused", reason)]
    assert steward.send(f"{path}/refuse", {**fields, "reason": reason}).status_code == 409


def test_the_command_keeps_a_reason_too(waiting: Federation) -> None:
    """And a refusal without one is the file that earlier releases wrote and read."""
    settings, file = waiting.settings(HOSPITAL), str(waiting.settings_file(HOSPITAL))
    assert CliRunner().invoke(app, ["refuse", file, STUDY, "--yes", "--reason", "Too dear."]).exit_code == 0
    kept = settings.state / "studies" / f"{STUDY}.refused.json"
    assert json.loads(kept.read_bytes())["reason"] == "Too dear."

    kept.unlink()
    propose(waiting)
    assert CliRunner().invoke(app, ["refuse", file, STUDY, "--yes"]).exit_code == 0
    assert json.loads(kept.read_bytes()).keys() == {"format", "study", "plan_digest", "time"}


def test_a_study_that_cannot_be_approved_says_why_by_a_code_and_can_still_be_refused(waiting: Federation) -> None:
    """The policy was changed since it was proposed."""
    change_policy(waiting, HOSPITAL, tasks=["heart-disease"])
    with at_the_page(waiting) as steward:
        text = steward.get(f"/studies/{STUDY}").text
        assert "the policy of this hospital does not permit it" in text
        assert f"/studies/{STUDY}/approve" not in text
        fields = steward.fields(f"/studies/{STUDY}", f"/studies/{STUDY}/refuse")
        assert steward.send(f"/studies/{STUDY}/refuse", {**fields, "reason": "no"}).status_code == 303


# what is never shown


def patients(federation: Federation) -> list[str]:
    """The ids in the hospital's records."""
    lines = (federation.settings(HOSPITAL).records / "data.csv").read_text("utf-8").splitlines()
    return [line.split(",")[lines[0].split(",").index("patient")] for line in lines[1:]]


def asked_for(steward: Steward, path: str, going_on: str) -> str:
    """A page after what its button begins is over."""
    assert steward.send(path, steward.fields(path, path)).status_code == 303
    deadline = time.monotonic() + 60
    while going_on in (text := steward.get(path).text):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return text


def checked(steward: Steward) -> str:
    """The page of the records after a check."""
    return asked_for(steward, "/records", "The records are being checked")


def test_no_patient_no_secret_and_no_exception_s_text_is_on_any_page(
    steward: Steward, waiting: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither when all is well, nor when a cell is wrong, nor when a line of the opt-out list is; nor in the log."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")
    settings, ids = waiting.settings(HOSPITAL), patients(waiting)
    assert settings.opt_out is not None
    settings.opt_out.write_text("\n".join(ids[:3]), encoding="utf-8")
    whole = [steward.get(path).text for path in PAGES] + [checked(steward)]
    assert "Fit for training" in whole[-1]
    assert "3 ids, 3 of them in these records" in whole[-1]

    settings.opt_out.write_text('"P-SECRET-17"', encoding="utf-8")
    broken = [steward.get(path).text for path in PAGES] + [checked(steward)]
    settings.opt_out.write_text("", encoding="utf-8")
    data = settings.records / "data.csv"
    cells = (lines := data.read_text("utf-8").splitlines())[3].split(",")
    cells[2] = "987654321"
    data.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]), encoding="utf-8")
    broken += [steward.get(path).text for path in PAGES] + [checked(steward)]

    assert "the records do not fit" in broken[-1]
    secrets = [line for key in settings.keys.identity.parent.glob("*.key") for line in key.read_text().splitlines()]
    secrets += [(settings.state / "local.key").read_bytes().hex(), "P-SECRET-17", "987654321", str(settings.records)]
    said = "\n".join([*whole, *broken, caplog.text])
    assert [secret for secret in secrets if "-----" not in secret and secret in said] == []
    assert [patient for patient in ids if re.search(rf"(?<![\w.]){re.escape(patient)}(?![\w.])", said)] == []
    assert "Traceback" not in "\n".join([*whole, *broken])


def test_an_error_that_nobody_thought_of_is_told_without_its_text(
    bystander: Steward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it happened is in the log; what it said could be a patient's value."""
    secret = "-".join(["P", "SECRET", "17"])  # this line of the test is in the log, and its text is not

    def fail(*_: object) -> None:
        raise ValueError(secret)

    monkeypatch.setattr(Desk, "budget", fail)

    answer = bystander.get("/budget")
    deadline = time.monotonic() + 60
    while "the page failed: ValueError" not in caplog.text:  # it is written after the answer was sent
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert answer.status_code == 500
    assert "the log says where" in answer.text
    assert secret not in answer.text + caplog.text
    assert bystander.get("/").status_code == 200


@pytest.mark.parametrize("path", ["/studies/nothing", "/nowhere", "/web/en.toml", "/page.css/../../page.py", "/docs"])
def test_there_is_nothing_else(bystander: Steward, path: str) -> None:
    """No generated documents, which would load scripts from elsewhere, and no files of this program."""
    answer = bystander.get(path)

    assert answer.status_code == 404
    assert "There is no such page." in answer.text


def test_hostile_words_stay_words_and_no_page_needs_another_host(bystander: Steward) -> None:
    """A purpose is free text: it opens no tag, ends none, and calls no template. No page has a script of its own."""
    for path in (*PAGES, "/login"):
        answer = bystander.get(path)
        tags = Markup(answer.text).tags

        assert [attributes for tag, attributes in tags if tag == "script"] == [{"src": "/page.js", "defer": None}]
        assert [name for _, attributes in tags for name in attributes if name.startswith(("on", "style"))] == []
        assert [attributes["src"] for tag, attributes in tags if tag == "img"] == ["/icon.svg"]
        assert answer.text.count("</main>") == 1
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", answer.text)) == set()
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("frame-ancestors") == "'none'"
        assert set(policy.values()) == {"'self'"}
        assert answer.headers["cache-control"] == "no-store"
        if path in {"/", f"/studies/{STUDY}"}:
            assert "{{ 7 * 7 }} {purpose}" in answer.text


def test_the_language_is_kept_and_leads_nowhere_else(bystander: Steward) -> None:
    """The switch comes back to the page that it was on, and to no other site."""
    for back, place in (
        ("/budget", "/budget"),
        ("//evil.example", "/"),
        ("http://evil.example/", "/"),
        ("/\\evil", "/"),
    ):
        answer = bystander.send("/language", {"to": "zh-Hans", "back": back})
        assert (answer.status_code, answer.headers["location"]) == (303, place)

    assert '<html lang="zh-Hans">' in bystander.get("/").text
    bystander.send("/language", {"to": "../../keys", "back": "/"})
    assert '<html lang="zh-Hans">' in bystander.get("/").text


# figures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation after a study of three rounds, of which a hospital has a page; and another study that is open."""
    federation = make_federation(tmp_path_factory.mktemp("run"), hospitals=3, rounds=3)
    add_page(federation.settings_file(HOSPITAL))
    federation.run()
    federation.plan = changed(federation.plan, study="second", privacy={"epsilon": 0.9, "spare_charges": 0})
    change_policy(federation, HOSPITAL, standing_approvals=[{"tasks": ["breast-cancer"]}])
    coordinator = Coordinator(federation)
    for name in federation.names:
        coordinator.propose(name)
    assert isinstance(coordinator.train(), Update)
    restart_hospitals()
    return federation


def test_the_curve_ends_where_the_budget_is(run: Federation) -> None:
    """Entry by entry the page adds up what the budget adds up: charged, reserved, and freed at a study's end."""
    burning = Burning()
    budget = read_budget(run.settings(HOSPITAL), burning.take_in)

    assert len(burning.points) == sum(
        entry.kind in {"budget-opened", "plan-approved", "charge", "study-closed"} for entry in run.ledger(HOSPITAL)
    )
    _, unspent, free = burning.points[-1]
    assert unspent == pytest.approx(budget.terms.epsilon - budget.filter_spent(), abs=1e-12)
    assert free == pytest.approx(budget.left(), abs=1e-12)
    assert burning.points[0][1:] == (budget.terms.epsilon, budget.terms.epsilon)
    assert all(free <= unspent + 1e-12 for _, unspent, free in burning.points)


def test_what_runs_what_was_spent_and_what_left_are_the_ledger_s_and_the_log_s(run: Federation) -> None:
    """The figures of the commands, on the page."""
    budget = read_budget(run.settings(HOSPITAL))
    with at_the_page(run) as steward:
        studies, spent, left = (html.unescape(steward.get(path).text) for path in ("/", "/budget", "/egress"))

    assert "round 1 of 3" in studies
    assert f"{budget.filter_spent('second'):.4f} of 0.9" in studies
    told = json.loads(CliRunner().invoke(app, ["budget", "--json", str(run.settings_file(HOSPITAL))]).output)
    for one, promised in zip(told["studies"], ("1", "0.9"), strict=True):
        assert one["epsilon"] < one["epsilon_filter"] <= one["epsilon_planned"]
        row = re.search(rf'href="/studies/{one["study"]}">.*?</tr>', spent, re.DOTALL)
        assert row is not None
        assert re.findall(r">([0-9.]+(?: of [0-9.]+)?)</td>", row[0])[1:-1] == [
            f"{one['epsilon_planned']:.4f} of {promised}",
            f"{one['epsilon_filter']:.4f}",
            f"{one['epsilon']:.4f}",
        ]
        assert one["accountant"] in spent
    assert f"<dd>{budget.left():.4f}</dd>" in spent
    assert "3 charges" in left
    told = CliRunner().invoke(app, ["egress", "--json", str(run.settings_file(HOSPITAL))]).output
    total = sum(row["bytes"] for row in json.loads(told)["fields"] if row["study"] == STUDY)
    assert f"{STUDY}: {total:,} bytes in all" in left


def test_the_doctor_comes_when_called_and_says_what_the_command_says(run: Federation) -> None:
    """The same findings, in the reader's language; of an error its code only, because its text may quote a cell."""
    file = str(run.settings_file(HOSPITAL))
    with at_the_page(run) as steward:
        found = json.loads(CliRunner().invoke(app, ["doctor", "--json", file]).output)
        before = steward.get("/health").text
        english = html.unescape(examined(steward))
        chinese = html.unescape(steward.get("/health", **{"accept-language": "zh-CN"}).text)

    assert "On 20" not in before
    shown = [re.sub(r"[0-9]+", "0", text) for text in re.findall(r"</span>\s*(.*?)\s*</dd>", english, re.DOTALL)]
    assert any(one["status"] == "fail" for one in found)
    for one in found:
        said = f"{one['text']} → {one['advice']}" if one["advice"] else one["text"]
        if one["code"]:
            assert words()(f"code.{one['code']}") in english
            assert one["text"] not in english + chinese
        else:
            assert re.sub(r"[0-9]+", "0", said) in shown
    assert "签名与头文件均成立" in chinese
    assert "无法连接" in chinese
    left = re.findall(r"</span>\s*(.*?)\s*</dd>", chinese, re.DOTALL)
    assert [text for text in left if not re.search(r"[\u4e00-\u9fff]", text) and "Python" not in text] == []


def examined(steward: Steward) -> str:
    """The page of the health after a visit of the doctor."""
    return asked_for(steward, "/health", "The doctor looks at everything.")


def test_health_is_what_the_files_say(run: Federation) -> None:
    """Of the daemon only what it said; a ledger that was cut is named."""
    settings, told = run.settings(HOSPITAL), Told()
    with at_the_page(run, told=told) as steward:
        assert "not known: this page was not started by the daemon" in steward.get("/health").text
        told.connection, told.since = "away", time.time()
        text = steward.get("/health").text
        assert "127.0.0.1:9443 does not answer since" in text
        assert "does not run" in text
        entries = run.ledger(HOSPITAL)
        assert f"{len(entries)} entries, {sum(e.kind == 'charge' for e in entries)} charges: chain, signatures" in text
        assert "roster 1, 3 members, valid until" in text

    head = settings.state / "ledger.sqlite.head"
    kept = head.read_bytes()
    head.write_bytes(kept[:4096] + bytes(4096))
    (settings.state / "rolled-back.json").write_text("{}", encoding="ascii")
    with at_the_page(run) as steward:
        broken = steward.get("/health").text
    head.write_bytes(kept)
    (settings.state / "rolled-back.json").unlink()

    assert "an old backup was restored" in broken
    assert "the ledger cannot be used" in broken


def test_a_page_that_the_settings_do_not_have_is_not_served(federation: Federation) -> None:
    """It is off unless asked for."""
    with pytest.raises(ConfigError, match="the settings have no page"):
        CliRunner().invoke(
            app, ["page", str(federation.settings_file(HOSPITAL))], catch_exceptions=False, standalone_mode=False
        )


def test_a_descriptor_that_is_no_socket_is_said_so(kept_waiting: Federation) -> None:
    """Only the daemon knows one."""
    arguments = ["page", str(kept_waiting.settings_file(HOSPITAL)), "--socket", "9999"]
    with pytest.raises(ConfigError, match="9999 is no socket"):
        CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)


def test_the_answer_is_only_for_this_machine(bystander: Steward) -> None:
    """It listens on 127.0.0.1 and on no other address of this machine."""
    port = bystander.client.base_url.port
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{port}/login", trust_env=False)
