"""The layout's own promises: names, tree, links, and what starts light."""

import ast
import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer

import auditor.cli
import client.cli
import server.cli
from client.books import Books
from client.records.manifest import Manifest
from client.settings import Settings as HospitalSettings
from client.settings import read_settings
from server.demo import lay_out
from server.examples import write_example
from server.settings import Settings as CoordinatorSettings
from shared_models.config import Frozen
from shared_models.plan import StudyPlan

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "client", "shared_models", "auditor")
TOP_FOLDERS = {".ci", *PACKAGES, "bench", "deploy", "docs", "tests"}
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "DECISIONS.md")), *(ROOT / "docs").rglob("*.md")]
HEAVY = ("torch", "flwr", "opacus", "grpc")


def sources(*folders: str) -> list[Path]:
    """Python files of some top-level folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def command(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python as a user would, outside the project's folder."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


# names


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_names_are_this_projects(package: str, tmp_path: Path) -> None:
    """Plain names can be shadowed by another installed package; here they are not."""
    found = command("-c", f"import {package}; print({package}.__file__)", cwd=tmp_path)

    assert Path(found.stdout.strip()) == ROOT / package / "__init__.py", found.stderr


def test_every_init_file_is_a_docstring_and_nothing_else() -> None:
    """A package's ``__init__.py`` runs on every import of anything in it."""
    files = [path for path in sources(*PACKAGES, "tests") if path.name == "__init__.py"]

    bodies = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}

    assert [path for path, body in bodies.items() if len(body.body) != 1 or not ast.get_docstring(body)] == []


def test_every_folder_with_code_is_a_package() -> None:
    """Without ``tests/server/__init__.py``, ``tests/server`` would shadow ``server``."""
    folders = {path.parent for path in sources(*PACKAGES, "tests")}

    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_top_level_has_the_agreed_folders_only() -> None:
    """A new top-level folder is a decision, not an accident. Generated ones are named in ``.gitignore``."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]

    found = {path.name for path in ROOT.iterdir() if path.is_dir()} - {".git"}

    assert {name for name in found if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)} == TOP_FOLDERS


# the README's tree


def listed() -> list[str]:
    """Paths in the README's tree; a folder ends with a slash."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Tree\n")[1]
    block = section.split("```text\n")[1].split("```")[0]
    above: list[str] = []
    paths = []
    for line in block.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 4
        above[depth:] = [name]
        paths.append("".join(above))
    return paths


def test_the_readme_lists_every_source_file_once() -> None:
    """One line per source file: of the packages, their data, benchmarks and deploy; tests have one per folder."""
    files = [path for path in sources(*PACKAGES, "bench", "deploy") if path.name != "__init__.py"]
    files += (ROOT / "server" / "plans").glob("*.toml")
    files += (ROOT / "tests").glob("[a-z]*.py")
    folders = {path.parent for path in sources("tests")} - {ROOT / "tests"}
    expected = Counter(str(path.relative_to(ROOT)) for path in files)
    expected += Counter(f"{path.relative_to(ROOT)}/" for path in folders)

    tree = Counter(path for path in listed() if path.endswith((".py", ".toml")) or path.startswith("tests/"))
    del tree["tests/"], tree["pyproject.toml"]

    assert {"listed, but not once": tree - expected, "not listed": expected - tree} == {
        "listed, but not once": Counter(),
        "not listed": Counter(),
    }


def test_the_readme_lists_nothing_that_is_not_there() -> None:
    """A line of the tree is a file or folder of the repository."""
    assert [path for path in listed() if not (ROOT / path).exists()] == []


# documents


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    """Links and pictures in Markdown point at files that are there."""
    text = document.read_text(encoding="utf-8")

    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]

    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_document_names_a_folder_of_one_machine(document: Path) -> None:
    """What is written here holds on every machine."""
    assert re.findall(r"(?<![\w.])/(?:tmp|home|root|work|Users)/\S*", document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("document", "number", "model"),
    [
        ("plan.md", 0, StudyPlan),
        ("hospital.md", 0, HospitalSettings),
        *(("hospital.md", number, Manifest) for number in range(1, 7)),
        ("coordinator.md", 0, CoordinatorSettings),
    ],
)
def test_the_examples_in_the_documents_are_valid(document: str, number: int, model: type[Frozen]) -> None:
    """Who copies an example starts from something that works."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")

    example = tomllib.loads(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[number])

    assert isinstance(model.model_validate_json(json.dumps(example), context={"folder": Path()}), model)


def nested(model: type[Frozen]) -> list[type[Frozen]]:
    """Models inside a model, at any depth."""
    found: list[type[Frozen]] = []
    waiting: list[object] = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        waiting += getattr(kind, "__args__", ())
        if isinstance(kind, type) and issubclass(kind, Frozen) and kind not in found:
            found.append(kind)
            waiting += [field.annotation for field in kind.model_fields.values()]
    return found


@pytest.mark.parametrize(
    ("model", "document"),
    [
        (StudyPlan, "plan.md"),
        (HospitalSettings, "hospital.md"),
        (Manifest, "hospital.md"),
        (CoordinatorSettings, "coordinator.md"),
    ],
)
def test_every_key_is_explained(model: type[Frozen], document: str) -> None:
    """The error hints send people to these documents for every key and its range."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")

    names = {name for found in [model, *nested(model)] for name in found.model_fields}

    assert [name for name in sorted(names) if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text)] == []


# what starts light, and what is never touched


@pytest.mark.parametrize("module", ["client.cli", "server.cli", "auditor.cli"])
def test_help_imports_nothing_heavy(module: str, tmp_path: Path) -> None:
    """``--help`` answers before torch, Flower or Opacus could have been imported."""
    code = (
        f"import sys; sys.argv = ['konsil', '--help']; from {module} import main\n"
        f"try:\n    main()\nfinally:\n    print(*(n for n in {HEAVY!r} if n in sys.modules), file=sys.stderr)"
    )

    found = command("-c", code, cwd=tmp_path)

    assert found.returncode == 0
    assert "Usage" in found.stdout
    assert found.stderr.strip() == ""


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_reading_tables_loads_no_other_readers_library(tmp_path: Path) -> None:
    """Extras are imported where a manifest asks for them: without them, tables are read as ever."""
    extras = {"nibabel", "PIL", "pydicom", "pyedflib", "sqlalchemy", "wfdb"}

    code = "import sys, client.records.report; print(*sys.modules)"
    found = command("-c", code, cwd=tmp_path)

    assert "client.records.pictures" in found.stdout.split(), found.stderr
    assert extras & set(found.stdout.split()) == set()


def test_nothing_imports_pickle() -> None:
    """A pickle is code. One test pickles, to show that a random generator refuses it."""
    refusal = ROOT / "tests" / "client" / "test_randomness.py"
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

    files = [path for path in sources(*PACKAGES, "bench", "tests") if path != refusal]

    assert [path for path in files if imported(path) & unsafe] == []
    assert [path for path in sources(*PACKAGES) if "torch.load" in path.read_text(encoding="utf-8")] == []


def test_no_private_key_lies_in_the_repository() -> None:
    """Keys are made where they are used."""
    files = [path for folder in TOP_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"]

    found = [path for path in files if path.is_file() and b"PRIVATE KEY-----\n" in path.read_bytes()]

    assert found == []


def _commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, found in getattr(group, "commands", {}).items():
        yield from _commands(found, (*path, name))
    if not hasattr(group, "commands"):
        yield path, group


@pytest.mark.parametrize("app", [client.cli.app, server.cli.app, auditor.cli.app])
def test_every_argument_and_option_says_what_it_is_for(app: typer.Typer) -> None:
    """In ``--help``, whatever versions of the libraries that write it are installed."""
    said = [
        (*path, parameter.name)
        for path, command in _commands(typer.main.get_command(app), ())
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]

    assert said == []


def test_no_command_prints_a_secret(tmp_path: Path) -> None:
    """Not in its output, not in an error about a key that it cannot use, not in the log, not in the ledger."""
    folder = tmp_path / "demo"
    example = write_example("breast-cancer", folder / "data", hospitals=3, seed=0)
    lay_out(folder, example, example.plan, port=1)
    home = folder / "hospitals" / "hospital-1"
    Books.open(read_settings(home / "hospital.toml")).close()
    keys = [*(home / "keys").glob("*.key")]
    secrets = {line for key in keys for line in key.read_text(encoding="ascii").splitlines() if "-" not in line}
    broken = tomllib.loads((home / "hospital.toml").read_text(encoding="utf-8"))
    broken["keys"]["identity"] = "keys/tls.key"
    (home / "broken.toml").write_text(tomli_w.dumps(broken), encoding="utf-8")
    calls = (["budget", "hospital.toml"], ["check-data", "hospital.toml"], ["start", "broken.toml"])

    said = [command("-m", "client.cli", name, str(home / file), cwd=tmp_path) for name, file in calls]

    assert [found.returncode for found in said] == [0, 0, 1]
    assert "error: " in said[-1].stderr
    assert len(secrets) > len(keys)
    text = "".join(found.stdout + found.stderr for found in said).encode()
    text += b"".join(path.read_bytes() for path in (home / "state").iterdir() if path.name != "local.key")
    assert [secret for secret in secrets if secret.encode() in text] == []
