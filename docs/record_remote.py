"""Record the terminal text of docs/remote-audit.md from a real study: ``python docs/record_remote.py``; takes a minute.

A coordinator and three hospitals as processes over TLS, on the breast-cancer example. Two hospitals leave evidence for
auditors. One of them then gets an old backup of its ledger, and says so without wanting to.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli_w

from server.demo import fit_plan, free_port, lay_out, start_hospital
from server.examples import write_example
from server.processes import Children
from shared_models.config import read_toml
from shared_models.control.access import connect, read_access

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "remote-audit.md"
SENDING, RESTORED = ("hospital-1", "hospital-2"), "hospital-2"
PATIENCE_S = 200.0
WATCH = ("konsil-audit", "watch", "--connection", "auditor/auditor.toml", "--root", "root.pub", "--once")


def main() -> None:
    """Run the study, and put what was printed into the document."""
    with TemporaryDirectory() as temporary:
        blocks = recorded(Path(temporary))
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- recorded: {name} -->\n```text\n).*?(```\n)", re.DOTALL)
        text, found = marked.subn(lambda match, block=block: match[1] + block + match[2], text)
        if found != 1:
            sys.exit(f"{DOCUMENT} has {found} blocks called {name}")
    DOCUMENT.write_text(text, encoding="utf-8")


def recorded(folder: Path) -> dict[str, str]:
    """All blocks, by name."""
    example = write_example("breast-cancer", folder / "data", hospitals=3, seed=0)
    lay_out(folder, example, fit_plan(example, 5), free_port()).save_key(folder / "authority" / "ca.key")
    settings, port = folder / "coordinator" / "coordinator.toml", free_port()
    fields = read_toml(settings, "settings")
    fields["tls"]["authority_key"], fields["control"] = str(folder / "authority" / "ca.key"), {"port": port}
    settings.write_text(tomli_w.dumps(fields), encoding="utf-8")
    shutil.copy(folder / "coordinator" / "root.pub", folder / "root.pub")
    for name in SENDING:
        path = folder / "hospitals" / name / "hospital.toml"
        fields = read_toml(path, "settings")
        fields["control"] = f"127.0.0.1:{port}"
        fields["policy"] |= {"send_checkpoints": True, "send_evidence": True}
        path.write_text(tomli_w.dumps(fields), encoding="utf-8")
    state, backup = folder / "hospitals" / RESTORED / "state", folder / "backup"
    with Children(folder / "logs") as children:
        issue = ("konsil-coordinator", "issue", "--settings", str(settings))
        for role in ("operator", "auditor"):
            children.run(role, *issue, f"{role}-anna", "--role", role, "--folder", str(folder / role))
        children.start("daemon", "konsil-coordinator", "start", "--settings", str(settings))
        until(lambda: "control service on" in (folder / "logs" / "daemon.log").read_text("utf-8"))
        daemons = [start_hospital(children, folder, hospital.name) for hospital in example.hospitals]
        with connect(read_access(folder / "auditor" / "auditor.toml")) as service:
            until(lambda: len(service.deposits()) == len(SENDING))
            backup.mkdir()
            for file in state.glob("ledger.sqlite*"):
                shutil.copy(file, backup)
            call = ("--operator", str(folder / "operator" / "operator.toml"))
            children.run("submit", "konsil-coordinator", "submit", str(folder / "plan.toml"), *call)
            until(lambda: len(service.deposits()) == 2 * len(SENDING))
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=30)
        blocks = {
            "fetching": run(folder, "konsil-audit", "fetch", "--connection", "auditor/auditor.toml", "-o", "evidence"),
            "watching": run(folder, *WATCH),
        }
        for file in state.glob("ledger.sqlite*"):
            file.unlink()
        for file in backup.iterdir():
            shutil.copy(file, state)
        blocks["the hospital"] = run(state.parent, "konsil-hospital", "ledger", "send", "hospital.toml")
        blocks["a rollback"] = run(folder, *WATCH)
    return blocks


def run(folder: Path, command: str, *arguments: str) -> str:
    """A command and what it prints, in a folder; long lines stay long."""
    modules = {"konsil-audit": "auditor.cli", "konsil-hospital": "client.cli"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", modules[command], *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"$ {command} {' '.join(arguments)}\n{done.stdout}"


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens within minutes, or not at all."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("it did not happen")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
