"""A bundle is what its sums say, or nothing is installed; releases come and go, and what hospitals own stays."""

import ast
import ensurepip
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
INSTALLER = ROOT / "deploy" / "bundle" / "install.sh"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
Bundle = Callable[..., Path]
UNREADABLE = "'1.10.0' in open(sys.argv[3]).read()"  # to the older release of these tests


def _build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle_build", ROOT / "deploy" / "bundle" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()


def _pip_wheel() -> Path:
    """The pip that comes with this Python; Debian keeps it elsewhere."""
    folders = (Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels"))
    return next(path for folder in folders for path in sorted(folder.glob("pip-*.whl")))


def _wheel(folder: Path, version: str, command: str) -> None:
    """A wheel of one module whose commands do what is told."""
    info = f"konsil-{version}.dist-info"
    files = {
        "tiny.py": f"import sys\nVERSION = '{version}'\ndef main():\n    {command}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: konsil\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nkonsil-hospital = tiny:main\nkonsil-audit = tiny:main\n",
    }
    with ZipFile(folder / f"konsil-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
        archive.writestr(f"{info}/RECORD", record)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Makes small bundles with the builder's own requirements and sums, and the project's own installer and unit."""

    def make(
        version: str, *, role: str = "hospital-cpu", python: str = PYTHON, command: str = "print(VERSION)"
    ) -> Path:
        folder = tmp_path / f"konsil-{version}-{role}-{python}"
        for part in ("wheels", "tools", "systemd"):
            (folder / part).mkdir(parents=True)
        _wheel(folder / "wheels", version, command)
        shutil.copy(_pip_wheel(), folder / "tools")
        shutil.copy(INSTALLER, folder)
        for unit in (ROOT / "deploy" / "systemd").glob("*.service"):
            shutil.copy(unit, folder / "systemd")
        text = f"VERSION={version}\nROLE={role}\nPYTHON={python}\nMACHINE={platform.machine()}\n"
        (folder / "BUNDLE").write_text(text, encoding="ascii")
        (folder / "requirements.txt").write_text(build.requirements(folder / "wheels"), encoding="ascii")
        build.write_sums(folder)
        return folder

    return make


def _installer(folder: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = ["/bin/sh", folder / "install.sh", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def _install(folder: Path, root: Path) -> "subprocess.CompletedProcess[str]":
    return _installer(folder, "install", "--root", root, "--python", sys.executable)


def _said(root: Path, command: str = "konsil-hospital") -> str:
    return subprocess.run([root / "usr/local/bin" / command], capture_output=True, text=True, check=True).stdout.strip()


def _lines(found: "subprocess.CompletedProcess[str]") -> list[str]:
    """The error and the hint, which end what a refusal says."""
    assert found.returncode != 0
    error, hint = found.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return [error, hint]


def test_upgrade_rollback_and_uninstall_keep_what_is_the_hospitals(bundle: Bundle, tmp_path: Path) -> None:
    """Each release lies beside the others; one link says which one runs. Settings and ledger are never touched.

    Going back is a decision of its own, not an accident of an old bundle, and is refused where the older release does
    not accept the ledger. A coordinator must not hold a hospital's keys. What an installation that was cut off has left
    behind is never run.
    """
    root = tmp_path / "root"
    settings = root / "etc/konsil/hospital.toml"
    accepts = f"print(VERSION); sys.exit(sys.argv[1:] == ['ledger', 'verify', {str(settings)!r}] and {UNREADABLE})"
    old, new = bundle("1.9.0", command=accepts), bundle("1.10.0")
    half = root / "opt/konsil/1.9.0/left.over"
    half.parent.mkdir(parents=True)
    half.touch()

    assert _install(old, root).returncode == 0
    assert not half.exists()
    ledger = root / "var/lib/konsil/state/ledger.sqlite"
    ledger.parent.mkdir()
    ledger.write_bytes(b"what patients' budgets have paid for")
    settings.write_text("a ledger of 1.10.0", encoding="ascii")
    said = [_said(root)]
    assert _install(new, root).returncode == 0
    said.append(_said(root))
    others = (old, bundle("2.0", role="coordinator"), bundle("1.10.0", role="hospital-cuda"))
    refused = [_lines(_install(folder, root)) for folder in others]
    shutil.rmtree(old)
    shutil.rmtree(new)
    installed = root / "usr/local/bin/konsil-install"
    unreadable = _installer(root / "opt/konsil/current", "rollback", "--root", root)
    said.append(_said(root))
    settings.write_text("a ledger of 1.9.0", encoding="ascii")
    assert subprocess.run([installed, "rollback", "--root", root], check=False).returncode == 0
    said.append(_said(root))
    listed = subprocess.run([installed, "status", "--root", root], capture_output=True, text=True, check=True).stdout
    gone = subprocess.run([installed, "uninstall", "--root", root], capture_output=True, text=True, check=True).stdout

    assert "release 1.9.0 does not accept the ledger" in _lines(unreadable)[0]
    assert said == ["1.9.0", "1.10.0", "1.10.0", "1.9.0"]
    assert "release 1.10.0 is installed, and the bundle has 1.9.0" in refused[0][0]
    assert "rollback" in refused[0][1]
    assert "this machine has the role hospital-cpu, and the bundle is for coordinator" in refused[1][0]
    assert "another build of 1.10.0 is installed, hospital-cpu" in refused[2][0]
    assert listed.splitlines() == ["  1.10.0 hospital-cpu", "* 1.9.0 hospital-cpu"]
    assert str(root / "var/lib/konsil") in gone
    assert ledger.read_bytes() == b"what patients' budgets have paid for"
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
    assert left == ["etc/konsil/hospital.toml", "var/lib/konsil/state/ledger.sqlite"]
    assert [path.stat().st_mode & 0o777 for path in (root / "etc/konsil", root / "var/lib/konsil")] == [0o700, 0o700]


def test_what_was_changed_on_the_way_is_not_installed(bundle: Bundle, tmp_path: Path) -> None:
    """A wheel, a file that the sums do not list, a wheel whose sum was changed along but not its hash."""
    found = []
    for number, tamper in enumerate((_change_wheel, _add_wheel, _change_wheel_and_sums)):
        folder = bundle(f"1.{number}")
        tamper(folder)
        found.append(_lines(_install(folder, tmp_path / "root"))[0])
        assert not (tmp_path / "root/opt/konsil/current").exists()

    assert "damaged, missing or changed" in found[0]
    assert "does not list" in found[1]
    assert "could not be installed" in found[2]


def _change_wheel(folder: Path) -> None:
    (wheel,) = (folder / "wheels").iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"\0")


def _add_wheel(folder: Path) -> None:
    _wheel(folder / "wheels", "9.9", "print('other')")


def _change_wheel_and_sums(folder: Path) -> None:
    _change_wheel(folder)
    build.write_sums(folder)


def test_a_wrong_python_is_refused_with_what_to_do(bundle: Bundle, tmp_path: Path) -> None:
    """Before anything is made."""
    found = _install(bundle("1.0", python="3.8"), tmp_path / "root")

    error, hint = _lines(found)
    assert f"this bundle is for Python 3.8, and {sys.executable} is Python {PYTHON}" in error
    assert "python3.8" in hint
    assert list((tmp_path / "root").iterdir()) == []


def test_every_wheel_has_its_hash(bundle: Bundle) -> None:
    """The installer's pip is given nothing that it may choose."""
    folder = bundle("1.2.3")
    (wheel,) = (folder / "wheels").iterdir()

    (line,) = (folder / "requirements.txt").read_text(encoding="ascii").splitlines()

    assert line == f"konsil==1.2.3 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


@pytest.mark.parametrize(
    ("role", "wheel", "refused"),
    [
        ("hospital-cpu", "nvidia_cublas-1-py3-none-any.whl", True),
        ("hospital-cuda", "torch-2-cp311-cp311-linux_x86_64.whl", True),
        ("hospital-cpu", "torch-2-cp311-cp311-linux_x86_64.whl", False),
        ("hospital-cuda", "nvidia_cublas-1-py3-none-any.whl", False),
    ],
)
def test_a_bundle_has_the_torch_of_its_role(role: str, wheel: str, refused: bool) -> None:
    """Gigabytes of CUDA are not carried to a machine without a GPU by accident, nor forgotten for one with it."""
    if refused:
        with pytest.raises(SystemExit, match=r"error: .*\nhint: "):
            build.check_torch(role, [wheel])
    else:
        build.check_torch(role, [wheel])


def test_roles_name_extras_that_there_are() -> None:
    """And all that a hospital's documents say has to be installed for something."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

    named = {extra for role in build.ROLES.values() for extra in role.split(",")}

    assert named <= set(extras)
    assert named >= set(extras) - {"attack", "bench", "peers", "docs", "dev"}


def test_the_source_of_a_bundle_is_the_project_and_its_version(tmp_path: Path) -> None:
    """Built as another release, it says so of itself in both places, and no compiled leftovers go along."""
    version = build.copy_source(tmp_path / "source", "7.7.7")

    project = tomllib.loads((tmp_path / "source/pyproject.toml").read_text(encoding="utf-8"))["project"]
    tree = ast.parse((tmp_path / "source/shared_models/versions.py").read_text(encoding="utf-8"))
    assert version == project["version"] == "7.7.7"
    assert "RELEASE = '7.7.7'" in [ast.unparse(node) for node in tree.body]
    assert list((tmp_path / "source").rglob("*.pyc")) == []
