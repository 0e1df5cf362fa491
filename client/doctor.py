"""Is everything as it must be at this hospital? One look at each thing that has stopped one before; it changes nothing.

What a check finds is a ``Finding``; texts name files, figures and dates, never a record.
"""

import time
from collections.abc import Iterator
from datetime import datetime

from client.anchor import ROLLED_BACK
from client.books import LEDGER, report
from client.bundle import verify_own
from client.expiry import expiries
from client.hours import is_open
from client.keyfiles import node_public_key
from client.membership import Membership, own_member
from client.process import running
from client.records.manifest import read_manifest
from client.records.opt_out import read_opt_outs
from client.settings import Settings
from client.tls import client_context
from shared_models.health import Finding, ask, entropy, expiring, look, owned, private, reach, room, versions
from shared_models.identity import load_key, public_bytes
from shared_models.privacy.ledger import CLOCK_TOLERANCE, head_path, stream_ledger

PACKAGES = ("konsil", "torch", "flwr", "opacus", "dp-accounting", "cryptography")
LITTLE_BUDGET = 0.05  # of epsilon


def examine(settings: Settings) -> list[Finding]:
    """All checks, in the order in which to mend what they find; the daemon may be running.

    Takes seconds; with a ledger of 100,000 entries, of which all are verified, a minute or two.

    Guarantees:
        * Nothing is changed. A file is written beside the ledger and removed again, to prove that there is room; a
          newer roster is pinned, as by every command that reads it.
        * No record is read: manifest and file names only. ``check-data`` reads all of them.
    """
    return look(_CHECKS, settings)


def _versions(_: Settings) -> Iterator[Finding]:
    yield versions(PACKAGES)


def _entropy(_: Settings) -> Iterator[Finding]:
    yield entropy()


def _disk(settings: Settings) -> Iterator[Finding]:
    yield room(settings.state)


def _permissions(settings: Settings) -> Iterator[Finding]:
    secrets = [settings.keys.identity, settings.keys.node, settings.tls.key]
    secrets += [folder / "local.key" for folder in (settings.state, settings.registry_folder)]
    if settings.page is not None and settings.page.tls is not None:
        secrets += [settings.page.tls.key, settings.page.tls.stewards.with_name("authority.key")]
    ours = [settings.state / name for name in (LEDGER, head_path(settings.state / LEDGER).name, "egress.jsonl")]
    yield private([*secrets, settings.state, settings.registry_folder])
    yield owned(settings.state, [*secrets, *ours, settings.registry_folder])


def _roster(settings: Settings) -> Iterator[Finding]:
    if not settings.keys.root.exists():
        yield Finding("roster", "fail", "this hospital has not joined yet", "konsil-hospital join hospital.toml KIT")
        return
    signed = Membership(settings).signed()
    keys = (public_bytes(load_key(settings.keys.identity)).hex(), node_public_key(settings.keys.node))
    own_member(signed, settings.name, keys, time.time())
    there = sum(member.valid(time.time()) for member in signed.members)
    yield Finding("roster", "ok", f"{settings.name} is one of {there} members of {signed.consortium}, its keys fit")


def _expiry(settings: Settings) -> Iterator[Finding]:
    yield from expiring(expiries(settings))


def _coordinator(settings: Settings) -> Iterator[Finding]:
    found = reach("coordinator", settings.coordinator)
    yield found
    if found.status == "ok" and settings.tls.certificate.exists():
        yield from look([_tls], settings)
    if settings.control is not None:
        yield reach("control", settings.control)


def _tls(settings: Settings) -> Iterator[Finding]:
    yield from ask(settings.coordinator, client_context(settings))


def _ledger(settings: Settings) -> Iterator[Finding]:
    if (settings.state / ROLLED_BACK).exists():
        yield Finding(
            "ledger",
            "fail",
            "an old backup is in use: the ledger lacks what this hospital signed",
            "Put the newest copy of the state folder back: konsil-hospital restore; see docs/operations.md.",
        )
        return
    newest = ""
    for entry in stream_ledger(settings.state / LEDGER):
        newest = entry.time
    found = verify_own(settings)
    if newest and datetime.fromisoformat(newest) > datetime.now().astimezone() + CLOCK_TOLERANCE:
        yield Finding("ledger", "fail", f"its newest entry is of {newest}: the clock was set back", "Set the clock.")
        return
    text = f"{found['entries']} entries, {found['charges']} charges: chain, signatures and head hold"
    yield Finding("ledger", "ok", text)


def _budget(settings: Settings) -> Iterator[Finding]:
    found = report(settings)
    left, whole = found["epsilon_left"], found["population"]["epsilon"]
    text = f"epsilon {left:.4g} of {whole:g} left for population {found['population']['name']}"
    if not left > LITTLE_BUDGET * whole:
        yield Finding("budget", "warn", text, "Hardly any study fits any more; these patients' budget never grows.")
    else:
        yield Finding("budget", "ok", text)


def _policy(settings: Settings) -> Iterator[Finding]:
    policy = settings.policy
    text = f"{len(policy.tasks)} tasks, {len(policy.networks)} networks; "
    text += (
        f"{len(policy.standing_approvals)} standing approvals" if policy.standing_approvals else "the steward is asked"
    )
    if not policy.tasks or not policy.networks:
        yield Finding("policy", "warn", "it permits no task or no network", "Name what may be trained in [policy].")
        return
    if policy.hours and not is_open(policy.hours, datetime.now()):
        text += "; outside its hours now"
    yield Finding("policy", "ok", text)


def _records(settings: Settings) -> Iterator[Finding]:
    manifest = read_manifest(settings.records)
    for file in manifest.files:
        with file.open("rb") as stream:
            stream.read(1)
    listed = len(read_opt_outs(settings.opt_out))
    text = f"{manifest.file.name} for task {manifest.task} can be read"
    yield Finding("records", "ok", f"{text}; {listed} patients say no" if settings.opt_out else text)


def _device(settings: Settings) -> Iterator[Finding]:
    if settings.device == "cpu":
        yield Finding("device", "ok", f"the CPU, threads = {settings.threads}")
        return
    from client.device import choose_device  # noqa: PLC0415 - torch takes seconds

    yield Finding("device", "ok", f"{choose_device(settings).type}, as device = {settings.device} finds it")


def _daemon(settings: Settings) -> Iterator[Finding]:
    there = running(settings.state)
    yield Finding("daemon", "ok", "not running" if there is None else f"running, process {there.pid}")


_CHECKS = (
    _versions,
    _entropy,
    _disk,
    _permissions,
    _records,
    _device,
    _policy,
    _ledger,
    _budget,
    _roster,
    _expiry,
    _coordinator,
    _daemon,
)
