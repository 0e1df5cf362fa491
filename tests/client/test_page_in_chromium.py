"""The hospital's page in a real browser: a consent from login to ledger, by keyboard alone; and on a phone."""

import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from client.consent import Consents, Proposed
from client.process import running
from server.demo import free_port, lay_out
from server.examples import write_example
from server.journal import read_events
from server.pki import Authority
from shared_models.approval import verify_approval
from shared_models.identity import load_key, public_bytes
from shared_models.messages import Refusal
from shared_models.privacy.ledger import read_ledger
from tests.browser import CHROMIUM, Browser, browsing, import_certificate
from tests.client.steward import PASSWORD, add_page, serving
from tests.client.test_page import HOSPITAL, PAGES, STUDY, make_waiting, propose
from tests.client.test_stewards import PASSPHRASE, House, run
from tests.federation import Federation, change_policy, changed, restart_hospitals

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

# The least contrast of all texts: of each the colour against the nearest background that is not transparent.
CONTRASTS = """(() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => parts(colour).slice(0, 3).map(part => part / 255)
        .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
        .reduce((sum, part, at) => sum + part * [.2126, .7152, .0722][at], 0);
    const behind = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parts(getComputedStyle(at).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return getComputedStyle(at).backgroundColor;
        }
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const [a, b] = [light(element.ownerSVGElement ? style.fill : style.color), light(behind(element))];
        found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), walker.currentNode.data.trim()]);
    }
    return found;
})()"""
FOCUS = """(() => {
    const at = document.activeElement;
    const style = getComputedStyle(at);
    const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
    return [at.textContent.trim() || at.id || at.name, at.tagName, seen];
})()"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A tab of a Chromium that has never run before."""
    with browsing(tmp_path / "chromium") as browser:
        yield browser


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A hospital with a study that has run, and one that waits."""
    federation = make_waiting(tmp_path_factory.mktemp("seen"))
    change_policy(federation, HOSPITAL, standing_approvals=[{"tasks": [STUDY]}])
    federation.run()
    change_policy(federation, HOSPITAL, standing_approvals=[])
    federation.plan = changed(federation.plan, study="second", privacy={"spare_charges": 0})
    propose(federation)
    restart_hospitals()
    return federation


def log_in(browser: Browser, address: str) -> None:
    """With the keyboard, in whose field the page begins."""
    browser.open(f"{address}/login")
    browser.write(PASSWORD)
    browser.press("Enter")
    browser.until("location.pathname === '/' && document.getElementById('live')?.textContent")


def tab_to(browser: Browser, text: str) -> None:
    """Go on by the Tab key until something has the focus; wherever it is on the way, it can be seen."""
    browser.until("document.readyState === 'complete'")  # with its style sheet
    for _ in range(60):
        browser.press("Tab")
        name, tag, seen = browser.ask(FOCUS)
        if tag in {"BODY", "MAIN"}:  # nothing, or the content that the first link leads to
            continue
        assert seen, f"the focus on {name!r} cannot be seen"
        if name == text:
            return
    raise AssertionError(f"no way to {text!r} by the keyboard")


def assert_at_peace(browser: Browser, address: str) -> None:
    """Nothing on the console, and no request to anywhere else."""
    assert browser.complaints == []
    assert [asked for asked in browser.asked if not asked.startswith(f"{address}/")] == []


@contextmanager
def daemon(settings_file: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The hospital's real daemon."""
    command = [sys.executable, "-m", "client.cli", "start", str(settings_file)]
    with log.open("wb") as lines, subprocess.Popen(command, stdout=lines, stderr=lines) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()


def test_a_consent_from_login_to_ledger_by_the_keyboard_alone(browser: Browser, tmp_path: Path) -> None:
    """A real daemon's page, which answers although the daemon is stopped; then the hospital takes the study up."""
    waiting = make_waiting(tmp_path)
    restart_hospitals()
    file, settings = waiting.settings_file(HOSPITAL), waiting.settings(HOSPITAL)
    authority = Authority(tmp_path / "authority")  # nobody is at the coordinator's address; the daemon tries and tries
    authority.issue(settings.tls.key.parent, HOSPITAL)
    shutil.copy(authority.certificate, settings.tls.ca)
    assert settings.page is not None
    address = f"http://127.0.0.1:{settings.page.port}"
    with daemon(file, tmp_path / "log") as process:
        deadline = time.monotonic() + 60
        while running(settings.state) is None or "no coordinator" not in (tmp_path / "log").read_text("utf-8"):
            assert process.poll() is None, (tmp_path / "log").read_text("utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        log_in(browser, address)
        tab_to(browser, "Skip to the content")
        browser.press("Enter")
        tab_to(browser, "Read and decide")
        browser.press("Enter")
        browser.until(f"location.pathname === '/studies/{STUDY}' && document.readyState === 'complete'")
        assert waiting.plan.digest() in browser.ask("document.body.innerText")

        tab_to(browser, "Approve and sign")
        browser.press("Enter")
        browser.until("document.body?.innerText.includes('You have approved this plan')")
        assert_at_peace(browser, address)
        tab_to(browser, "Log out")
        browser.press("Space")
        browser.until("location.pathname === '/login'")
    with pytest.raises(httpx.ConnectError):  # the page has ended with the daemon
        httpx.get(address, trust_env=False)

    approval = Consents(settings.state).approved(STUDY)
    assert approval is not None
    verify_approval(
        approval, public_bytes(load_key(settings.keys.identity)), study=STUDY, plan_digest=waiting.plan.digest()
    )
    assert not isinstance(propose(waiting), Refusal)
    newest = waiting.ledger(HOSPITAL)[-1]
    assert (newest.kind, newest.approved_by, newest.approval) == ("plan-approved", "steward", approval.signature)


@pytest.mark.skipif(shutil.which("pk12util") is None, reason="no pk12util here: apt-get install libnss3-tools")
def test_a_steward_s_certificate_opens_the_page_until_it_is_revoked(tmp_path: Path) -> None:
    """Imported as a person imports it; a real daemon's page over TLS. Then the browser says in plain words why not."""
    house = House(tmp_path / "house")
    run("page-password", house.file, "--remove")
    settings = house.federation.settings(HOSPITAL)
    authority = Authority(tmp_path / "authority")
    authority.issue(settings.tls.key.parent, HOSPITAL)
    shutil.copy(authority.certificate, settings.tls.ca)
    assert settings.page is not None
    address, anna = f"https://127.0.0.1:{settings.page.port}", house.folder / "anna.p12"
    home = tmp_path / "chromium"
    import_certificate(home, address, authority=house.folder / "authority.pem", file=anna, passphrase=PASSPHRASE)
    with daemon(house.file, tmp_path / "log"), browsing(home) as browser:
        deadline = time.monotonic() + 60
        while "the page: https" not in (tmp_path / "log").read_text("utf-8"):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text("utf-8")
            time.sleep(0.05)
        browser.open(f"{address}/login")
        assert "certificate of anna" in browser.ask("document.body.innerText")
        tab_to(browser, "Log in with the certificate")
        browser.press("Enter")
        browser.until("location.pathname === '/' && document.getElementById('live')?.textContent")
        tab_to(browser, "Read and decide")
        browser.press("Enter")
        browser.until(f"location.pathname === '/studies/{STUDY}' && document.readyState === 'complete'")
        tab_to(browser, "Approve and sign")
        browser.press("Enter")
        browser.until("document.body?.innerText.includes('You have approved this plan')")
        assert_at_peace(browser, address)

        run("page-revoke", house.file, "anna")
        browser.open(f"{address}/budget")
        assert browser.ask("location.pathname") == "/login"
        said = browser.ask("document.body.innerText")

    assert "It was revoked." in said
    assert "Password" not in said
    assert Consents(settings.state).approved(STUDY) is not None


def test_it_fits_and_can_be_read(browser: Browser, seen: Federation) -> None:
    """No page is wider than the window, and every text has a contrast of 4.5 to 1, in both languages (WCAG 2.2 AA)."""
    with serving(seen.settings_file(HOSPITAL)) as address:
        log_in(browser, address)
        browser.open(f"{address}/health")
        browser.until("document.querySelector('form[action=\"/health\"] button')")
        browser.ask("document.querySelector('form[action=\"/health\"] button').click()")
        browser.until("document.body?.innerText.includes('things looked at')")
        for language, other in (("en", "zh-Hans"), ("zh-Hans", "en")):
            for path in (*PAGES, "/studies/second", "/studies/nothing"):
                browser.open(address + path)
                browser.ask("document.querySelectorAll('details').forEach(one => { one.open = true; })")
                assert browser.ask("document.documentElement.lang") == language
                for width, dark in ((390, False), (390, True), (1280, False), (1280, True)):
                    browser.size(width, 844, phone=width == 390, dark=dark)
                    contrasts = browser.ask(CONTRASTS)

                    assert browser.ask("document.documentElement.scrollWidth") == width, path
                    assert len(contrasts) >= 8
                    assert [text for contrast, text in contrasts if not contrast >= 4.5] == []
            browser.ask("document.querySelector('form[action=\"/language\"] button').click()")
            browser.until(f"document.documentElement?.lang === '{other}'")
        assert all("404" in complaint for complaint in browser.complaints)


def test_a_form_of_another_page_decides_nothing(browser: Browser, seen: Federation, tmp_path: Path) -> None:
    """Neither from another name nor from another port of this machine, which comes with the steward's cookie."""
    with serving(seen.settings_file(HOSPITAL)) as address, elsewhere(tmp_path, f"{address}/studies/second") as port:
        log_in(browser, address)

        for host in ("localhost", "127.0.0.1"):
            browser.open(f"http://{host}:{port}/forged.html")
            browser.ask("document.forms[0].submit()")
            browser.until(f"location.href.startsWith('{address}/') && document.readyState === 'complete'")
            assert "approved" not in browser.ask("document.body.innerText")

        browser.open(f"{address}/")
        assert browser.ask("location.pathname") == "/"
        refused = [entry for entry in browser.complaints if "403" in entry]
        assert len(refused) == 2
    assert Consents(seen.settings(HOSPITAL).state).approved("second") is None


@contextmanager
def elsewhere(folder: Path, study: str) -> Iterator[int]:
    """Another page of this machine, with a form that approves."""
    fields = "".join(f'<input name="{name}" value="{"0" * 64}">' for name in ("digest", "seen", "token"))
    text = f'<form method="post" action="{study}/approve">{fields}</form>'
    (folder / "forged.html").write_text(text, encoding="ascii")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]  # what the server hands on

        def log_message(self, *_: object) -> None:
            """Nothing is said."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_it_can_be_used_without_scripts_and_follows_with_them(browser: Browser, seen: Federation) -> None:
    """Everything is drawn by the hospital; a script only saves the reload, and only where nobody is reading."""
    with serving(seen.settings_file(HOSPITAL)) as address:
        log_in(browser, address)
        browser.ask("window.mark = 'the same document'")
        assert "third" not in browser.ask("document.querySelector('main').innerText")
        waits = seen.settings(HOSPITAL).state / "studies" / "third.json"
        plan = changed(seen.plan, study="third")
        kept = Proposed(study="third", plan_digest=plan.digest(), time="2026-01-01T00:00:00.000Z", plan=plan)
        waits.write_text(kept.model_dump_json(), encoding="utf-8")
        browser.until("document.querySelector('main')?.innerText.includes('third')")
        assert browser.ask("window.mark") == "the same document"
        waits.unlink()

        browser.tell("Emulation.setScriptExecutionDisabled", value=True)
        for path in PAGES:
            browser.open(address + path)
            assert browser.ask("document.querySelector('h1').innerText.length") > 0
        browser.open(f"{address}/budget")
        assert (
            browser.ask("Math.min(...[...document.querySelectorAll('polyline')].map(one => one.getTotalLength()))") > 0
        )
        assert_at_peace(browser, address)


@pytest.mark.soak
def test_a_study_that_is_approved_on_the_page_runs_to_its_end(browser: Browser, tmp_path: Path) -> None:
    """A real coordinator and three real daemons over TLS; one of them asks its steward, who answers in Chromium."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=3, seed=0)
    plan = changed(example.plan, rounds=3)
    lay_out(tmp_path, example, plan, free_port())
    homes = [tmp_path / "hospitals" / hospital.name for hospital in example.hospitals]
    asked = Federation(tmp_path, example, plan)
    change_policy(asked, HOSPITAL, standing_approvals=[])
    address = f"http://127.0.0.1:{add_page(homes[0] / 'hospital.toml')}"
    study = ("--settings", str(tmp_path / "coordinator" / "coordinator.toml"), "--folder", str(tmp_path / "study"))
    commands = [["server.cli", "run", str(tmp_path / "plan.toml"), *study]]
    commands += [["client.cli", "start", str(home / "hospital.toml")] for home in homes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        children = [
            subprocess.Popen([sys.executable, "-m", *c], stdout=log, stderr=log, env=environment) for c in commands
        ]
        try:
            deadline = time.monotonic() + 120
            while not (homes[0] / "state" / "studies" / f"{STUDY}.json").exists():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text("utf-8")
                time.sleep(0.1)
            log_in(browser, address)
            browser.open(f"{address}/studies/{STUDY}")
            browser.ask("document.querySelector('form[action$=approve] button').click()")
            browser.until("document.body?.innerText.includes('You have approved this plan')")
            assert children[0].wait(timeout=240) == 0, (tmp_path / "log").read_text("utf-8")
            browser.open(f"{address}/")
            browser.until("document.querySelector('.state.closed')")
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
    events = read_events(tmp_path / "study" / "events.jsonl")[0]
    assert [event["missing"] for event in events if event["event"] == "round"] == [[]] * 3
    (entry,) = [e for e in read_ledger(homes[0] / "state" / "ledger.sqlite") if e.kind == "plan-approved"]
    assert entry.approved_by == "steward"
