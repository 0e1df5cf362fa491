"""Is everything as it must be at this hospital? One look at each thing that has stopped one before; it changes nothing.

What a check finds is a ``Finding``; texts name files, figures and dates, never a record.
"""

import time
from collections.abc import Iterator
from datetime import datetime

from cryptography.x509 import load_pem_x509_certificates

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
from shared_models.health import Finding, ask, entropy, expiring, listening, look, owned, private, reach, room, versions
from shared_models.identity import load_key, public_bytes
from shared_models.phrase import Phrase
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
        advice = Phrase("Run: {command}", command="konsil-hospital join hospital.toml KIT")
        yield Finding("roster", "fail", Phrase("this hospital has not joined yet"), advice)
        return
    signed = Membership(settings).signed()
    keys = (public_bytes(load_key(settings.keys.identity)).hex(), node_public_key(settings.keys.node))
    own_member(signed, settings.name, keys, time.time())
    there = sum(member.valid(time.time()) for member in signed.members)
    text = Phrase(
        "{name} is one of {count} members of {consortium}, its keys fit",
        name=settings.name,
        count=there,
        consortium=signed.consortium,
    )
    yield Finding("roster", "ok", text)


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
            Phrase("an old backup is in use: the ledger lacks what this hospital signed"),
            Phrase("Put the newest copy of the state folder back: konsil-hospital restore; see docs/operations.md."),
        )
        return
    newest = ""
    for entry in stream_ledger(settings.state / LEDGER):
        newest = entry.time
    found = verify_own(settings)
    if newest and datetime.fromisoformat(newest) > datetime.now().astimezone() + CLOCK_TOLERANCE:
        text = Phrase("its newest entry is of {time}: the clock was set back", time=newest)
        yield Finding("ledger", "fail", text, Phrase("Set the clock."))
        return
    text = Phrase(
        "{entries} entries, {charges} charges: chain, signatures and head hold",
        entries=found["entries"],
        charges=found["charges"],
    )
    yield Finding("ledger", "ok", text)


def _budget(settings: Settings) -> Iterator[Finding]:
    found = report(settings)
    left, whole = found["epsilon_left"], found["population"]["epsilon"]
    name = found["population"]["name"]
    text = Phrase("epsilon {left:.4g} of {whole:g} left for population {name}", left=left, whole=whole, name=name)
    if not left > LITTLE_BUDGET * whole:
        advice = Phrase("Hardly any study fits any more; these patients' budget never grows.")
        yield Finding("budget", "warn", text, advice)
    else:
        yield Finding("budget", "ok", text)


def _policy(settings: Settings) -> Iterator[Finding]:
    policy = settings.policy
    if not policy.tasks or not policy.networks:
        text = Phrase("it permits no task or no network")
        yield Finding("policy", "warn", text, Phrase("Name what may be trained in [policy]."))
        return
    asked = Phrase("the steward is asked")
    if policy.standing_approvals:
        asked = Phrase("{count} standing approvals", count=len(policy.standing_approvals))
    closed = policy.hours and not is_open(policy.hours, datetime.now())
    text = Phrase(
        "{tasks} tasks, {networks} networks; {asked}{hours}",
        tasks=len(policy.tasks),
        networks=len(policy.networks),
        asked=asked,
        hours=Phrase("; outside its hours now") if closed else "",
    )
    yield Finding("policy", "ok", text)


def _records(settings: Settings) -> Iterator[Finding]:
    manifest = read_manifest(settings.records)
    for file in manifest.files:
        with file.open("rb") as stream:
            stream.read(1)
    listed = len(read_opt_outs(settings.opt_out))
    text = Phrase("{file} for task {task} can be read", file=manifest.file.name, task=manifest.task)
    if settings.opt_out:
        text = Phrase("{read}; {count} patients say no", read=text, count=listed)
    yield Finding("records", "ok", text)


def _device(settings: Settings) -> Iterator[Finding]:
    if settings.device == "cpu":
        yield Finding("device", "ok", Phrase("the CPU, threads = {threads}", threads=settings.threads))
        return
    from client.device import choose_device  # noqa: PLC0415 - torch takes seconds

    found = choose_device(settings).type
    yield Finding("device", "ok", Phrase("{found}, as device = {wanted} finds it", found=found, wanted=settings.device))


def _page(settings: Settings) -> Iterator[Finding]:
    if settings.page is None:
        return
    yield listening("page", "127.0.0.1", settings.page.port)
    if settings.page.tls is None:
        return
    for file in (settings.page.tls.certificate, settings.page.tls.key, settings.page.tls.revoked):
        if file is not None:
            file.read_bytes()
    count = len(load_pem_x509_certificates(settings.page.tls.stewards.read_bytes()))
    yield Finding(
        "page", "ok", Phrase("its TLS files can be read; {count} certificates say whom it lets in", count=count)
    )


def _daemon(settings: Settings) -> Iterator[Finding]:
    there = running(settings.state)
    text = Phrase("not running") if there is None else Phrase("running, process {pid}", pid=there.pid)
    yield Finding("daemon", "ok", text)


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
    _page,
    _daemon,
)
