"""A study by people who have no account on the coordinator's machine: every step is a command with a certificate."""

import contextlib
import json
import os
import signal
import socket
import ssl
import tarfile
import time
from pathlib import Path

import pytest
import tomli_w

from server.demo import fit_plan, free_port, lay_out, start_hospital
from server.examples import write_example
from server.processes import Children
from shared_models.config import read_toml
from shared_models.errors import FederationError
from tests.federation import changed

PATIENCE_S = 200
STUDY = "breast-cancer"


class Centre:
    """A coordinator's daemon, and people who call it.

    Args:
        folder: As ``lay_out`` made it, with the authority's key.
        children: All processes.
    """

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self.children = folder, children
        self.settings = folder / "coordinator" / "coordinator.toml"
        self.port = free_port()
        fields = read_toml(self.settings, "settings")
        fields["tls"]["authority_key"] = str(folder / "authority" / "ca.key")
        fields["control"] = {"port": self.port}
        self.settings.write_text(tomli_w.dumps(fields), encoding="utf-8")
        self._calls = 0

    def start(self) -> int:
        """Start the daemon and wait until it listens. Returns its process id."""
        process = self.children.start("daemon", "konsil-coordinator", "start", "--settings", str(self.settings))
        log = self.folder / "logs" / "daemon.log"
        deadline = time.monotonic() + PATIENCE_S
        while "control service on" not in log.read_text("utf-8"):
            assert self.children.check("daemon")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return process.pid

    def issue(self, role: str) -> None:
        """A certificate for somebody of a role."""
        where = ("--settings", str(self.settings), "--folder", str(self.folder / role))
        self.children.run("issue", "konsil-coordinator", "issue", f"{role}-anna", "--role", role, *where)

    def call(self, role: str, *arguments: str) -> str:
        """One command of somebody's, with nothing but the folder that was handed over. Returns what it prints."""
        self._calls += 1
        operator = ("--operator", str(self.folder / role / f"{role}.toml"))
        return self.children.run(f"call-{self._calls}", "konsil-coordinator", *arguments, *operator)


@pytest.mark.timeout(PATIENCE_S + 60)
def test_a_study_is_run_from_elsewhere(tmp_path: Path) -> None:
    """Issued, submitted, watched to its end, fetched, cross-checked; the coordinator ends in between and comes back."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=3, seed=0)
    plan = changed(fit_plan(example, 2), deadline_s=60.0)
    lay_out(tmp_path, example, plan, free_port()).save_key(tmp_path / "authority" / "ca.key")
    with Children(tmp_path / "logs") as children:
        centre = Centre(tmp_path, children)
        for role in ("operator", "auditor", "viewer"):
            centre.issue(role)
        for hospital in example.hospitals:
            start_hospital(children, tmp_path, hospital.name)
        daemon = centre.start()

        submitted = json.loads(centre.call("operator", "submit", str(tmp_path / "plan.toml"), "--json"))
        watched = centre.call("viewer", "watch", STUDY, "--json").splitlines()
        with pytest.raises(FederationError, match="viewer viewer-anna may not call Control/Stop"):
            centre.call("viewer", "stop", STUDY)
        with pytest.raises(FederationError, match=f"study {STUDY} is finished: it never begins again"):
            centre.call("operator", "resume", STUDY)
        newest = old_tls(centre)
        os.kill(daemon, signal.SIGTERM)
        code = children._children["daemon"].wait(timeout=30)
        centre.start()

        listed = json.loads(centre.call("auditor", "list", "--json"))
        model = json.loads(centre.call("operator", "model", STUDY, "--out", str(tmp_path / "model"), "--json"))
        centre.call("auditor", "evidence", STUDY, "--out", str(tmp_path / "evidence.tar"))
        centre.call("auditor", "audit", "fetch", "--out", str(tmp_path / "audit.jsonl"))
        with tarfile.open(tmp_path / "evidence.tar") as tar:
            tar.extractall(tmp_path / "evidence", filter="data")
        homes = [tmp_path / "hospitals" / hospital.name for hospital in example.hospitals]
        ledgers = [str(home / "state" / "ledger.sqlite") for home in homes]
        folder = ("--study", str(tmp_path / "evidence" / STUDY))
        verified = children.run("verify", "konsil-audit", "verify", *ledgers, *folder)
        key = str(tmp_path / "coordinator" / "state" / "audit.pub")
        log = children.run("log", "konsil-audit", "log", str(tmp_path / "audit.jsonl"), "--key", key)
        own = children.run("own", "konsil-coordinator", "audit", "verify", "--settings", str(centre.settings))

    events = [json.loads(line) for line in watched]
    assert submitted["submitted_by"] == "operator operator-anna"
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2]
    assert [event["event"] for event in events][-2:] == ["finished", "state"]
    assert code == 0
    assert [(study["name"], study["state"], study["rounds_done"]) for study in listed] == [(STUDY, "finished", 2)]
    assert model["bytes"] == (tmp_path / "model").stat().st_size > 0
    assert (tmp_path / "model").read_bytes() == Path(event_of("finished", events)["model"]).read_bytes()
    assert len((tmp_path / "evidence" / STUDY / "sums.jsonl").read_bytes().splitlines()) >= 2
    assert verified.count("holds    ") == 3
    assert log.startswith("holds")
    assert "1 of them refused" in log
    assert own.startswith("holds")
    assert newest == {ssl.TLSVersion.TLSv1_2: None, ssl.TLSVersion.TLSv1_3: "TLSv1.3"}


def event_of(kind: str, events: list[dict[str, str]]) -> dict[str, str]:
    """The one event of a kind."""
    (found,) = [event for event in events if event["event"] == kind]
    return found


def old_tls(centre: Centre) -> dict[ssl.TLSVersion, str | None]:
    """What comes of a handshake, with a good certificate, by the newest version of TLS that a client offers."""
    home = centre.folder / "viewer"
    found: dict[ssl.TLSVersion, str | None] = {}
    for most in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=home / "ca.pem")
        context.load_cert_chain(home / "tls.pem", home / "tls.key")
        context.set_alpn_protocols(["h2"])
        context.maximum_version = most
        found[most] = None
        plain = socket.create_connection(("127.0.0.1", centre.port))
        with contextlib.suppress(ssl.SSLError), context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            found[most] = tls.version()
    return found
