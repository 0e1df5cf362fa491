"""The documentation's site: built without a warning, whole without a network, its reference complete."""

import importlib.util
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from client.settings import Settings as HospitalSettings
from server.settings import Settings as CoordinatorSettings
from shared_models.config import Frozen
from shared_models.plan import StudyPlan
from tests.deploy.tools import DEPLOY, ROOT

sphinx = pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install konsil[docs]")


def builder() -> ModuleType:
    """``deploy/site/build.py``, which is no package's."""
    folder = DEPLOY / "site"
    sys.path.insert(0, str(folder))
    try:
        found = importlib.util.spec_from_file_location("build_site", folder / "build.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


class Links(HTMLParser):
    """What a page links to, what it loads, and where in it one can link to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors, self.linked, self.loaded = set[str](), list[str](), list[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.linked.append(found["href"])
        elif tag == "link":
            self.loaded.append(found.get("href", ""))
        elif tag != "a" and "src" in found:
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    target = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, str(DEPLOY / "site" / "build.py"), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    return target


def test_every_link_of_every_page_leads_somewhere(site: Path) -> None:
    """To a file of the site, and to a place in it; other hosts are linked to, and nothing is loaded from them."""

    @cache
    def links(page: Path) -> Links:
        return Links(page)

    broken = []
    for page in site.rglob("*.html"):
        for link in (*links(page).linked, *links(page).loaded):
            to = urlsplit(link)
            if to.scheme:
                broken += [(page.name, link)] if link in links(page).loaded and to.scheme != "data" else []
                continue
            target = (page.parent / unquote(to.path)).resolve() if to.path else page
            anchor = unquote(to.fragment)
            if not target.is_file() or (anchor and target.suffix == ".html" and anchor not in links(target).anchors):
                broken.append((page.name, link))

    assert len(list(site.rglob("*.html"))) > 40
    assert broken == []


def test_the_reference_has_every_command_and_every_key(site: Path) -> None:
    """Made from the code at every build: nothing to keep up to date."""
    reference = builder().reference
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")}

    missing = [
        " ".join(path)
        for name, app in reference.COMMANDS.items()
        for path, _ in reference.commands((name,), reference.typer.main.get_command(app))
        if f"<h2>{' '.join(path)}<" not in pages[name]
    ]
    models: list[tuple[str, type[Frozen]]] = [
        ("hospital-toml", HospitalSettings),
        ("coordinator-toml", CoordinatorSettings),
        ("plan-toml", StudyPlan),
    ]
    for page, model in models:
        missing += [key for key in model.model_fields if f'<span class="pre">{key}</span>' not in pages[page]]

    assert missing == []


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    """A page or a heading that was renamed is found here, not by a reader."""
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text("# A page\n\n[one](nowhere.md) and [another](#no-heading)\n", encoding="utf-8")
    code = "import sys, pathlib, build; sys.exit(build.render(*map(pathlib.Path, sys.argv[1:3]), doctrees=sys.argv[3]))"
    command = [sys.executable, "-c", code, str(pages), str(tmp_path / "html"), str(tmp_path / "doctrees")]

    done = subprocess.run(command, cwd=DEPLOY / "site", capture_output=True, text=True, check=False, timeout=100)

    assert done.returncode == 1, done.stderr
    assert "'nowhere.md'" in done.stderr
    assert "'no-heading'" in done.stderr


def test_links_that_leave_the_documents_lead_to_pages_of_the_site() -> None:
    """From where a page will stand, not from where its text stands; what is code is left alone."""
    moved = builder().moved
    text = "[a](../server/page.py) [b](privacy.md#x) [c](https://d.e/f) `[g](h.md)` [i](../README.md)"

    from_docs = moved(text, "docs/plan.md", "plan.md")
    deeper = moved("[a](../../server/page.py) [b](../privacy.md)", "docs/zh/README.md", "zh/README.md")

    assert from_docs == ("[a](source/server/page.py.md) [b](privacy.md#x) [c](https://d.e/f) `[g](h.md)` [i](index.md)")
    assert deeper == "[a](../source/server/page.py.md) [b](../privacy.md)"
