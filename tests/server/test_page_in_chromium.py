"""The page in a real browser: it runs, says nothing on the console, asks no other host, and fits a phone."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.demo import free_port
from server.page import serving
from server.settings import PageSettings
from tests.browser import CHROMIUM, Browser, browsing
from tests.server.conftest import WAITING, Seen

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

LETTERS = """[...document.querySelectorAll("main *")].map(element => {
    const picture = element.ownerSVGElement;
    const scale = picture ? picture.getBoundingClientRect().width / picture.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(element).fontSize) * scale;
})"""
TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A tab of a Chromium that has never run before."""
    with browsing(tmp_path) as browser:
        yield browser


@pytest.fixture
def address(seen: Seen) -> Iterator[str]:
    """The page on loopback."""
    port = free_port()
    settings = seen.settings.model_copy(update={"page": PageSettings(port=port)})
    with seen.studies() as studies, serving(settings, studies):
        yield f"http://127.0.0.1:{port}"


def assert_at_peace(browser: Browser, address: str) -> None:
    """Nothing on the console, and no request to anywhere else."""
    assert browser.complaints == []
    assert [asked for asked in browser.asked if not asked.startswith(f"{address}/")] == []


@pytest.mark.parametrize(("width", "phone", "dark"), [(1280, False, False), (1280, False, True), (360, True, False)])
def test_it_is_whole_in_every_size(browser: Browser, address: str, width: int, phone: bool, dark: bool) -> None:
    """Every page fits its width, curves are drawn, and letters are large enough to read on a phone."""
    browser.size(width, 780, phone=phone, dark=dark)
    for path in ("/", "/studies/breast-cancer", f"/studies/{WAITING}", "/login"):
        browser.open(address + path)
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert min(browser.ask(LETTERS)) >= 11

    browser.open(f"{address}/studies/breast-cancer")
    browser.until("document.getElementById('live').textContent === 'live'")

    lines = browser.ask("[...document.querySelectorAll('polyline')].map(line => line.getTotalLength())")
    assert len(lines) >= 4 + 1 + 1
    assert min(lines) > 0
    shown = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", shown)) < 200) == dark
    assert_at_peace(browser, address)


def test_what_happens_is_shown_without_a_reload(browser: Browser, address: str, seen: Seen) -> None:
    """An event in the journal is on the page a moment later; hostile words in it are only words."""
    browser.open(f"{address}/studies/{WAITING}")
    browser.ask("window.mark = 'the same document'")
    assert "hospital-9" not in browser.ask("document.body.innerText")

    seen.waiting.write("left-out", hospital="hospital-9", round=1, stage="train", reason="<img src=x onerror=hacked=1>")

    browser.until("document.body.innerText.includes('hospital-9 left out at train: <img src=x onerror=hacked=1>')")
    assert browser.ask("window.mark") == "the same document"
    assert browser.ask("typeof window.hacked") == "undefined"
    assert_at_peace(browser, address)


def test_it_can_be_read_without_scripts(browser: Browser, address: str) -> None:
    """Everything is drawn by the coordinator; a script only saves the reload."""
    browser.tell("Emulation.setScriptExecutionDisabled", value=True)

    browser.open(f"{address}/studies/breast-cancer")

    text = browser.ask("document.body.innerText")
    assert "4 of 4 rounds" in text
    assert "hospital-4" in text
    assert browser.ask("document.querySelectorAll('polyline').length") >= 6


def test_a_viewer_comes_in_with_the_token(browser: Browser, seen: Seen, tmp_path: Path) -> None:
    """The form leads to the studies, and no script can read what it left behind."""
    token_file = tmp_path / "viewers.token"
    token_file.write_text(TOKEN, encoding="ascii")
    token_file.chmod(0o600)
    page = PageSettings(port=free_port(), token_file=token_file)
    address = f"http://127.0.0.1:{page.port}"
    with seen.studies() as studies, serving(seen.settings.model_copy(update={"page": page}), studies):
        browser.open(f"{address}/studies/breast-cancer")
        assert browser.ask("location.pathname") == "/login"

        browser.ask(f"document.getElementById('token').value = '{TOKEN}'; document.querySelector('form').submit()")

        browser.until("location.pathname === '/' && document.body.innerText.includes('breast-cancer')")
        browser.until("document.getElementById('live').textContent === 'live'")
        assert browser.ask("document.cookie") == ""
        assert_at_peace(browser, address)
