"""Record the terminal text of docs/hospital.md from a real study: ``python docs/record.py``; takes two minutes.

A coordinator and four hospitals as processes over TLS, on the breast-cancer example. One steward is asked. In the
middle of the study that hospital gets other software: a copy of this one with a comment more. What its commands print
on a terminal of 100 columns takes the place of the blocks that ``<!-- recorded: NAME -->`` marks in the document.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli_w

from client.consent import STUDIES
from server.demo import fit_plan, free_port, lay_out
from server.examples import write_example
from server.journal import read_events
from shared_models.config import read_toml

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "hospital.md"
HOSPITALS, ASKED = 4, "hospital-1"
PATIENCE_S = 300.0
ROUNDS, UPGRADED_AT = 60, 2  # enough of them for the steward to answer in the middle
SHOWN_AGAIN = ("study ", "software", "asked again", "price", "budget left")  # rows; the others are as they were


def main() -> None:
    """Run the study, and put what was printed into the document."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        blocks = recorded(folder)
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- recorded: {name} -->\n```text\n).*?(```\n)", re.DOTALL)
        text, found = marked.subn(lambda match, block=block: match[1] + block + match[2], text)
        if found != 1:
            sys.exit(f"{DOCUMENT} has {found} blocks called {name}")
    DOCUMENT.write_text(text, encoding="utf-8")


def recorded(folder: Path) -> dict[str, str]:
    """All blocks, by name."""
    example = write_example("breast-cancer", folder / "data", hospitals=HOSPITALS, seed=0)
    plan = fit_plan(example, ROUNDS)
    lay_out(folder, example, plan, free_port())
    home = folder / "hospitals" / ASKED
    settings = read_toml(home / "hospital.toml", "settings file")
    settings["policy"]["standing_approvals"] = []
    settings["population"]["epsilon"] = 3.0
    (home / "hospital.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    waits = home / "state" / STUDIES / f"{plan.study}.json"
    steward = Steward(home)
    with processes(folder, [hospital.name for hospital in example.hospitals]) as start:
        until(waits.exists)
        first = [steward.run("studies", "hospital.toml"), steward.run("approve", "hospital.toml", plan.study, yes=True)]
        until(lambda: rounds(folder, answered_by=ASKED) >= UPGRADED_AT)
        steward.run("stop", "hospital.toml")
        steward.root = upgraded(folder / "upgraded")
        start(ASKED, steward.root)
        until(waits.exists)
        again = [steward.run("studies", "hospital.toml"), steward.run("approve", "hospital.toml", plan.study, yes=True)]
        until(lambda: finished(folder))
        after = [steward.run("budget", "hospital.toml"), steward.run("start", "hospital.toml")]
        after.append(steward.run("stop", "hospital.toml"))
    return {
        "a study that waits": "\n".join(first),
        "other software": again[0] + "\n" + shortened(again[1]),
        "afterwards": "\n".join(after),
    }


class Steward:
    """Runs commands in the hospital's folder, on a terminal of their own.

    Attributes:
        root: The software that is run.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.root = home, ROOT

    def run(self, *arguments: str, yes: bool = False) -> str:
        """What the terminal shows, the command itself included; ``yes`` is typed at its question."""
        here, there = pty.openpty()
        command = [sys.executable, "-m", "client.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "1"}
        child = subprocess.Popen(command, cwd=self.home, stdin=there, stdout=there, stderr=there, env=environment)
        os.close(there)
        if yes:
            os.write(here, b"y\n")
        shown = re.sub(r"\x1b\[[0-9;]*m", "", b"".join(_read(here)).decode()).replace("\r\n", "\n")
        os.close(here)
        child.wait()
        shown = shown.removeprefix("y\n")  # the terminal's echo, which came before the question
        shown = shown.replace("[y/N]: ", "[y/N]: y\n") if yes else shown
        return f"$ konsil-hospital {' '.join(arguments)}\n" + "".join(
            f"{line.rstrip()}\n" for line in shown.splitlines()
        )


def _read(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(terminal, 65_536)
        except OSError:  # how Linux says that the other end was closed
            return
        yield data


@contextmanager
def processes(folder: Path, names: list[str]) -> Iterator[Callable[[str, Path], None]]:
    """Everybody's process; yields what starts a hospital's from other software."""
    running: list[subprocess.Popen[bytes]] = []

    def start(root: Path, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *arguments]
        with (folder / "log").open("ab") as log:
            running.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment))

    def hospital(name: str, root: Path) -> None:
        start(root, "client.cli", "start", str(folder / "hospitals" / name / "hospital.toml"))

    try:
        settings = str(folder / "coordinator" / "coordinator.toml")
        study = ("--settings", settings, "--folder", str(folder / "study"))
        start(ROOT, "server.cli", "run", str(folder / "plan.toml"), *study)
        for name in names:
            hospital(name, ROOT)
        yield hospital
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait()


def upgraded(folder: Path) -> Path:
    """Other software: this one, with a comment more."""
    for package in ("client", "shared_models"):
        shutil.copytree(ROOT / package, folder / package)
    with (folder / "shared_models" / "software.py").open("a", encoding="utf-8") as file:
        file.write("# a later release\n")
    return folder


def shortened(shown: str) -> str:
    """Only the rows that are news; three dots where others were."""
    kept: list[str] = []
    inside = True
    for line in shown.splitlines():
        if not line.startswith(" "):
            inside = line.startswith((*SHOWN_AGAIN, "$", "Approve"))
        if inside or kept[-1] != "...":
            kept.append(line if inside else "...")
    return "\n".join(kept) + "\n"


def rounds(folder: Path, *, answered_by: str) -> int:
    """How many rounds a hospital has answered."""
    events = read_events(folder / "study" / "events.jsonl")[0]
    return sum(event["event"] == "round" and answered_by in event["answered"] for event in events)


def finished(folder: Path) -> bool:
    """Whether the study is over."""
    return any(event["event"] == "finished" for event in read_events(folder / "study" / "events.jsonl")[0])


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens within two minutes, or not at all."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("it did not happen")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
