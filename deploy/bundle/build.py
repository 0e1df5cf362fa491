"""Build what one role installs without a network: wheels with hashes, an SBOM, an installer; ``make bundle`` runs it.

A bundle is for one role, one Python and one kind of processor: those of the interpreter that runs this. On Debian 12
take its Python 3.11. The versions are those of ``deploy/constraints.txt``.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
FOR_HOSPITALS = "hospital,images,signals,sql,pretrained,explain,onnx,serve"
ROLES = {  # who installs offline cannot add an extra later, so a bundle has all that its role may need
    "hospital-cpu": FOR_HOSPITALS,
    "hospital-cuda": FOR_HOSPITALS,
    "coordinator": "coordinator,postgresql,explain,tensorboard",
    "auditor": "remote",
}
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SBOM = "sbom.cdx.json"
ELSEWHERE = {"debian-12": ("3.11", 36), "ubuntu-24.04": ("3.12", 39)}  # their Python, and N of their glibc 2.N


def main() -> None:
    """Build the bundles that are asked for, or only resolve what one on another system would hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roles", nargs="+", choices=[*ROLES, "all"], help="what to build")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bundles", help="where to (build/bundles)")
    parser.add_argument("--release", help="build as this version, to rehearse an upgrade; it says so of itself")
    parser.add_argument("--resolve", choices=ELSEWHERE, help="build nothing: resolve the wheels for this system")
    parser.add_argument("--pip", action="append", default=[], metavar="OPTION", help="for pip, such as --pip=--quiet")
    asked = parser.parse_args()
    for role in ROLES if "all" in asked.roles else asked.roles:
        if asked.resolve:
            print(resolve(role, asked.resolve, asked.pip))
        else:
            print(build(role, asked.out.absolute(), asked.release, asked.pip))


def build(role: str, out: Path, release: str | None, options: Sequence[str] = ()) -> Path:
    """Make one bundle: a folder, and beside it the same as a tar archive with its SHA-256.

    Args:
        role: Of ``ROLES``.
        out: Where the bundles go.
        release: Built as this version; the project's own unless told otherwise.
        options: Further ones for pip, such as an index with torch's CPU build.

    Returns:
        The bundle's folder.
    """
    source = out / "source" / role
    version = copy_source(source, release)
    bundle = out / f"konsil-{version}-{role}-py{PYTHON}-{platform.machine()}"
    shutil.rmtree(bundle, ignore_errors=True)
    wheels = bundle / "wheels"
    wheels.mkdir(parents=True)
    pip("wheel", *options, "--constraint", CONSTRAINTS, "--wheel-dir", wheels, f"{source}[{ROLES[role]}]", epoch=True)
    pip("download", *options, "--constraint", CONSTRAINTS, "--no-deps", "--dest", bundle / "tools", "pip")
    check_torch(role, [path.name for path in wheels.iterdir()])
    (bundle / "requirements.txt").write_text(requirements(wheels), encoding="ascii")
    shutil.copy(ROOT / "deploy" / "bundle" / "install.sh", bundle)
    shutil.copy(ROOT / "LICENSE", bundle)
    shutil.copy(ROOT / "docs" / "install.md", bundle / "INSTALL.md")
    for name in ("hospital", "coordinator"):
        if role.startswith(name):
            (bundle / "systemd").mkdir()
            shutil.copy(ROOT / "deploy" / "systemd" / f"konsil-{name}.service", bundle / "systemd")
            if name == "hospital":
                shutil.copytree(ROOT / "deploy" / "systemd" / "examples", bundle / "systemd" / "examples")
    said = {"VERSION": version, "ROLE": role, "PYTHON": PYTHON, "MACHINE": platform.machine()}
    (bundle / "BUNDLE").write_text("".join(f"{key}={value}\n" for key, value in said.items()), encoding="ascii")
    write_sums(bundle)
    write_sbom(bundle, source, out)
    write_sums(bundle)
    pack(bundle)
    shutil.rmtree(source)
    return bundle


def copy_source(target: Path, release: str | None) -> str:
    """Copy what goes into the wheel, so that nothing left over from another build does. Returns the version."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for package in sorted({name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    version = str(project["project"]["version"])
    if release is not None:
        for path, line in (
            (target / "pyproject.toml", "version = "),
            (target / "shared_models/versions.py", "RELEASE = "),
        ):
            path.write_text(path.read_text(encoding="utf-8").replace(f'{line}"{version}"', f'{line}"{release}"'))
    return release or version


def pip(*arguments: str | Path, epoch: bool = False) -> None:
    """Run this interpreter's pip; ``epoch`` for wheels with the same bytes whenever they are built."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1577836800"} if epoch else None
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True, env=environment)


def check_torch(role: str, names: Iterable[str]) -> None:
    """A CPU's bundle must not hold gigabytes of CUDA, and a GPU's must not lack them."""
    cuda = any(name.startswith("nvidia_") for name in names)
    if cuda and role != "hospital-cuda":
        sys.exit(
            "error: pip took the CUDA build of torch\n"
            "hint: name the index of torch's CPU build: make bundle ARGS='--pip=--extra-index-url=INDEX'"
        )
    if role == "hospital-cuda" and not cuda:
        sys.exit(
            "error: pip took a build of torch without CUDA\n"
            "hint: take away the index or folder of the CPU build from pip's configuration"
        )


def requirements(wheels: Path) -> str:
    """Every wheel by name, version and SHA-256, as ``pip install --require-hashes`` takes them."""
    lines = []
    for wheel in sorted(wheels.iterdir()):
        with ZipFile(wheel) as archive:
            (metadata,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            found = HeaderParser().parsestr(archive.read(metadata).decode("utf-8"))
        lines.append(f"{found['Name']}=={found['Version']} --hash=sha256:{sha256(wheel)}\n")
    return "".join(lines)


def write_sbom(bundle: Path, source: Path, out: Path) -> None:
    """Install the bundle, as its user will, and list what is installed then as CycloneDX."""
    tool, trial = out / "cyclonedx", out / "trial"
    if not (tool / "bin" / "cyclonedx-py").exists():
        subprocess.run([sys.executable, "-m", "venv", tool], check=True)
        named = "cyclonedx-bom[validation]"
        subprocess.run([tool / "bin" / "pip", "install", "--quiet", "--constraint", CONSTRAINTS, named], check=True)
    shutil.rmtree(trial, ignore_errors=True)
    installer = bundle / "install.sh"
    subprocess.run(["/bin/sh", installer, "install", "--root", trial, "--python", sys.executable], check=True)
    options = ("--output-reproducible", "--pyproject", source / "pyproject.toml", "--output-file", bundle / SBOM)
    installed = trial / "opt" / "konsil" / "current" / "bin" / "python"
    subprocess.run([tool / "bin" / "cyclonedx-py", "environment", *options, installed], check=True)
    shutil.rmtree(trial)


def write_sums(bundle: Path) -> None:
    """SHA-256 of every file of the bundle, as ``sha256sum --check`` reads them."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    text = "".join(f"{sha256(path)}  {path.relative_to(bundle)}\n" for path in files)
    (bundle / "SHA256SUMS").write_text(text, encoding="ascii")


def pack(bundle: Path) -> None:
    """One archive, with the same bytes for the same files; wheels are compressed already."""

    def anybody(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    archive = bundle.with_name(f"{bundle.name}.tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(bundle, bundle.name, filter=anybody)
    archive.with_name(f"{archive.name}.sha256").write_text(f"{sha256(archive)}  {archive.name}\n", encoding="ascii")


def resolve(role: str, system: str, options: Sequence[str] = ()) -> str:
    """Whether every wheel for another system is there; nothing is installed.

    Returns:
        One line that says how many there are.
    """
    (python, glibc), report = ELSEWHERE[system], ROOT / "build" / f"resolved-{role}-{system}.json"
    report.parent.mkdir(exist_ok=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted, waiting = [*extras["dependencies"]], ROLES[role].split(",")
    while waiting:  # an extra may name others
        for requirement in extras["optional-dependencies"][waiting.pop()]:
            others = re.fullmatch(r"konsil\[(.*)\]", requirement)
            waiting += others[1].split(",") if others else []
            wanted += [] if others else [requirement]
    machine = platform.machine()
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(glibc, 4, -1)]
    pip(
        *("install", "--dry-run", "--ignore-installed", f"--target={report.with_suffix('')}", f"--report={report}"),
        *("--only-binary=:all:", f"--python-version={python}", f"--constraint={CONSTRAINTS}", *options),
        *(*platforms, f"--platform=manylinux2014_{machine}", f"--platform=linux_{machine}", *wanted),
    )
    found = [item["download_info"]["url"].rpartition("/")[2] for item in json.loads(report.read_bytes())["install"]]
    check_torch(role, found)
    return f"{role} on {system}, Python {python}: {len(found)} wheels, and Konsil's own"


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
