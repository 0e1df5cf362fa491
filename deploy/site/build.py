"""Build the documentation's site: ``python deploy/site/build.py FOLDER``.

Sphinx gets a folder in which the README is the first page, the reference is made from the code, and a link from a
document to a source file leads to a page that shows the file. So the site is whole without a network: it loads nothing
from elsewhere, opens from a folder, and its search needs no server. A link that leads nowhere ends the build.
"""

import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import reference  # noqa: E402 - beside this file, and it imports the project

DOCS = ROOT / "docs"
FROM_ELSEWHERE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "DECISIONS.md": "decisions.md"}
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")  # neither an anchor of the page itself nor another host
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)  # what is code has no links
LANGUAGES = {".py": "python", ".toml": "toml", ".proto": "protobuf", ".json": "json", ".yaml": "yaml", ".yml": "yaml"}
ROLES = ("hospital", "coordinator", "auditor", "data-scientist")
NAVIGATION = {
    "Tutorials": [f"tutorials/{role}" for role in ROLES],
    "How to": ["install", "deploy", "operations", "hospital", "coordinator", "plan", "audit", "remote-audit", "attack"],
    "Reference": [*reference.pages(), "protocol", "benchmarks", "changelog"],
    "Explanation": ["explained", "privacy", "architecture", "decisions"],
    "中文": ["zh/README", *(f"zh/tutorials/{role}" for role in ROLES)],
}


def build(target: Path) -> int:
    """Build the site into a folder; what was there is replaced.

    Returns:
        Sphinx's exit status: 0 only if there was no warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        lay_out(pages)
        shutil.rmtree(target, ignore_errors=True)
        return render(pages, target, doctrees=Path(folder) / "doctrees")


def render(pages: Path, target: Path, *, doctrees: Path) -> int:
    """Have Sphinx make HTML of pages; every warning is an error, a link that leads nowhere too."""
    settings = ["-c", str(Path(__file__).parent), "-d", str(doctrees)]
    return sphinx(["-b", "html", "-q", "-W", "--keep-going", *settings, str(pages), str(target)])


def lay_out(pages: Path) -> None:
    """Write every page, and copy what is no page."""
    texts = {
        page: moved((ROOT / name).read_text(encoding="utf-8"), name, page) for name, page in FROM_ELSEWHERE.items()
    }
    for path in sorted(DOCS.rglob("*")):
        name = path.relative_to(DOCS).as_posix()
        if path.suffix == ".md":
            texts[name] = moved(path.read_text(encoding="utf-8"), f"docs/{name}", name)
        elif path.is_file() and path.suffix != ".py":
            (pages / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, pages / name)
    texts |= {f"{name}.md": text for name, text in reference.pages().items()}
    shown = sorted(
        {target for text in texts.values() for target in re.findall(r"\]\((?:\.\./)*source/(\S+?)\.md\)", text)}
    )
    if gone := [name for name in shown if not (ROOT / name).exists()]:
        sys.exit(f"error: documents link to what is not there: {', '.join(gone)}")
    texts |= {f"source/{name}.md": _shown(ROOT / name) for name in shown}
    texts["index.md"] += _navigation(texts.keys())
    for name, text in texts.items():
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / name).write_text(text, encoding="utf-8")


def moved(markdown: str, written: str, page: str) -> str:
    """Markdown of a file of the repository, with links as from a page of the site.

    Args:
        markdown: The text.
        written: Where it stands in the repository.
        page: Where it will stand in the site.
    """

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(written), match[1]))
        if target in FROM_ELSEWHERE:
            to = FROM_ELSEWHERE[target]
        elif target.startswith("docs/"):
            to = target.removeprefix("docs/")
        else:
            return f"]({_relative(f'source/{target}.md', page)})"
        return f"]({_relative(to, page)}{match[2] or ''})"

    return "".join(part if number % 2 else LINK.sub(lead, part) for number, part in enumerate(CODE.split(markdown)))


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _shown(path: Path) -> str:
    """A page that shows a file, or lists a folder. It is in no contents, and a search finds documents, not these."""
    head = f"---\norphan: true\nnosearch: true\n---\n\n# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return head + "\n".join(f"- `{child.name}`" for child in sorted(path.iterdir()) if child.is_file()) + "\n"
    return f"{head}`````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}`````\n"


def _navigation(pages: Collection[str]) -> str:
    """The contents; what is not written yet is left out."""
    parts = []
    for caption, names in NAVIGATION.items():
        listed = "\n".join(name for name in names if f"{name}.md" in pages)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n{listed}\n```\n")
    return "\n" + "\n".join(parts)


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").absolute()))
