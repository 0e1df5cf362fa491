"""The report and the papers in a real browser: whole, silent, alone, and fit for paper."""

from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from auditor.audit import audit
from auditor.papers import as_html
from auditor.record import Audit
from auditor.render import render_report
from auditor.report import make_report
from auditor.statement import make_statement
from shared_models.identity import read_public
from tests.auditor.conftest import Told
from tests.auditor.made_up import large
from tests.browser import CHROMIUM, Browser, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

SIZES = "[...document.querySelectorAll('td, p, text')].map(e => parseFloat(getComputedStyle(e).fontSize))"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A tab of a Chromium that has never run before."""
    with browsing(tmp_path) as browser:
        yield browser


@pytest.fixture(scope="module")
def real(told: Told) -> Audit:
    """Two real studies, audited."""
    return audit(told.everything, root=read_public(told.root))


def opened(browser: Browser, path: Path, text: str) -> str:
    """Write a page and open it; its address."""
    path.write_text(text, encoding="utf-8")
    browser.open(path.as_uri())
    return path.as_uri()


@pytest.mark.parametrize("width", [1200, 390])
def test_it_is_whole_silent_and_alone(browser: Browser, real: Audit, tmp_path: Path, width: int) -> None:
    """The style sheet passes its own policy, every curve is drawn, nothing is asked for, and it fits the width."""
    browser.size(width, 900, phone=width < 600)

    address = opened(browser, tmp_path / "report.html", render_report(make_report(real), real))

    assert browser.complaints == []
    assert browser.asked == [address]
    assert browser.ask("getComputedStyle(document.querySelector('#verdict')).borderLeftWidth") == "12px"
    assert browser.ask("document.documentElement.scrollWidth") == width
    lines = browser.ask("[...document.querySelectorAll('polyline')].map(line => line.getTotalLength())")
    assert len(lines) >= 2 * 4 + 4 + 1
    assert min(lines) > 0
    assert min(browser.ask(SIZES)) >= 11


def test_a_number_leads_to_its_entry(browser: Browser, real: Audit, tmp_path: Path) -> None:
    """A click on what was spent moves to the newest charge, and marks it."""
    opened(browser, tmp_path / "report.html", render_report(make_report(real), real))
    last = max(line.seq for line in real.hospitals[0].lines if line.kind == "charge")

    browser.ask(f"document.querySelector('a[href=\"#hospital-1-entry-{last}\"]').click()")

    row = f"document.getElementById('hospital-1-entry-{last}')"
    assert browser.ask(f"location.hash === '#hospital-1-entry-{last}'")
    assert browser.ask(f"getComputedStyle({row}).outlineStyle") == "solid"
    browser.until(f"{row}.getBoundingClientRect().bottom > 0 && {row}.getBoundingClientRect().top < innerHeight")


@pytest.mark.parametrize("pages", [range(8, 25), range(8, 60)], ids=["two real studies", "20 hospitals, 1,000 rounds"])
def test_it_prints(browser: Browser, real: Audit, tmp_path: Path, pages: range) -> None:
    """As a PDF of a number of A4 pages that somebody reads; nothing is asked for on the way."""
    found = real if pages.stop == 25 else large(20, 1000)
    address = opened(browser, tmp_path / "report.html", render_report(make_report(found), found))

    printed = b64decode(browser.tell("Page.printToPDF", preferCSSPageSize=True)["data"])

    assert printed.count(b"/Type /Page\n") in pages
    assert browser.complaints == []
    assert browser.asked == [address]


def test_the_papers_open_as_well(browser: Browser, real: Audit, tmp_path: Path) -> None:
    """Silent and alone, with the fields that are left open marked."""
    address = opened(browser, tmp_path / "papers.html", as_html(make_statement(real, "lungs")))

    assert browser.complaints == []
    assert browser.asked == [address]
    assert browser.ask("document.querySelectorAll('.open').length") > 10
