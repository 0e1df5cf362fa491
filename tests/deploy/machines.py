"""Fresh Debian machines on this one: a debootstrapped system each, with its own systemd, and no network outside.

A machine is a set of namespaces with a copy-on-write view of one system. Machines see each other on loopback, and
nobody else. Needs root, debootstrap, unshare, nsenter and overlayfs. What a kernel shares between namespaces stays
shared: the clock, and cgroup controllers that the host keeps to itself.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "python3,systemd,systemd-sysv,dbus,iproute2"
NEEDED = ("debootstrap", "unshare", "nsenter")

BOOT = """
set -eu
lower=$1 upper=$2
mount --make-rprivate /
mkdir -p "$upper/changes" "$upper/work" "$upper/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper/changes,workdir=$upper/work" "$upper/root"
cd "$upper/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
for device in null zero full random urandom tty; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
touch dev/console
mkdir -p dev/pts dev/shm old mnt/bundles
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t devpts devpts dev/pts
mount -t tmpfs tmpfs dev/shm
mount --bind "$3" mnt/bundles
mount -o remount,bind,ro mnt/bundles
hostname "$4"
pivot_root . old
umount -l /old
export container=konsil-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec /lib/systemd/systemd --system --log-target=journal
"""


def missing() -> str:
    """Why there can be no machines here; nothing if there can."""
    if os.geteuid() != 0:
        return "only root can make machines"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def fresh_debian(folder: Path) -> Path:
    """A minimal Debian 12 with Python and systemd, as debootstrap makes it; kept, because it does not change."""
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder / "complete").touch()
    return folder


@dataclass
class Machine:
    """A machine that runs.

    Attributes:
        name: Its host name.
        init: Its systemd's process, as this machine numbers it.
    """

    name: str
    init: int

    @property
    def root(self) -> Path:
        """Its file system, seen from here."""
        return Path(f"/proc/{self.init}/root")

    def run(self, *command: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command there as root, as somebody who is logged in.

        Raises:
            AssertionError: It failed, and ``check`` was asked for.
        """
        clean = (
            "/usr/bin/env",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
        )
        enter = ("nsenter", f"--target={self.init}", "--all", "--wdns=/")
        found = subprocess.run(
            [*enter, *clean, *map(str, command)], capture_output=True, text=True, check=False, timeout=900
        )
        assert found.returncode == 0 or not check, f"{self.name}: {command}: {found.stdout}{found.stderr}"
        return found

    def shown(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", unit).stdout.strip()

    def until(self, unit: str, key: str, value: str, *, patience_s: float = 180) -> None:
        """Wait until a property of a unit holds a text.

        Raises:
            AssertionError: It did not happen; with the unit's journal.
        """
        deadline = time.monotonic() + patience_s
        while value not in (found := self.shown(unit, key)):
            journal = "" if time.monotonic() < deadline else self.run("journalctl", "--no-pager", "-u", unit).stdout
            assert time.monotonic() < deadline, f"{self.name}: {unit}: {key} is {found!r}\n{journal[-3000:]}"
            time.sleep(0.5)

    def json(self, *command: str) -> object:
        """What a command says with --json."""
        return json.loads(self.run(*command, "--json").stdout)


@contextmanager
def network() -> Iterator[int]:
    """A network with nothing but loopback; gives a process that is in it."""
    holder = subprocess.Popen(["/usr/bin/unshare", "--net", "/bin/sh", "-c", "ip link set lo up; exec sleep infinity"])
    try:
        time.sleep(0.5)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


@contextmanager
def machine(name: str, *, system: str, folder: Path, bundles: Path, net: int) -> Iterator[Machine]:
    """A machine while it runs: ``system`` with its own changes on top, and ``bundles`` at /mnt/bundles.

    Args:
        name: Its host name.
        system: What it begins with; folders separated by colons, the uppermost first.
        folder: Where its changes go.
        bundles: A folder that it can read.
        net: A process in its network.
    """
    with _cgroup(f"konsil-test-{os.getpid()}-{name}") as members:
        join = ("/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(members))
        unshare = ("unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child")
        boot = ("/bin/sh", "-c", BOOT, "boot", system, str(folder), str(bundles), name)
        command = [*join, "nsenter", f"--net=/proc/{net}/ns/net", *unshare, *boot]
        outer = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            found = Machine(name, _child(outer.pid))
            deadline = time.monotonic() + 120
            while found.run("systemctl", "is-system-running", check=False).stdout.strip() not in {
                "running",
                "degraded",
            }:
                assert outer.poll() is None and time.monotonic() < deadline, f"{name} did not start"  # noqa: PT018
                time.sleep(0.5)
            yield found
        finally:
            outer.send_signal(signal.SIGKILL)  # its child, the machine's first process, ends with it, and all others
            outer.communicate()


def _child(parent: int) -> int:
    """The machine's first process, once it is there."""
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + 20
    while not (children := listed.read_text(encoding="ascii").split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(children[0])


@contextmanager
def _cgroup(name: str) -> Iterator[Path]:
    """A group of processes of its own, which a machine's systemd takes for the whole tree; gives the list of it."""
    with tempfile.TemporaryDirectory() as mounted:
        subprocess.run(["/bin/mount", "-t", "cgroup2", "cgroup2", mounted], check=True)
        group = Path(mounted) / name
        try:
            group.mkdir()
            yield group / "cgroup.procs"
            for _ in range(50):  # what was killed takes a moment to go
                with suppress(OSError):
                    for folder in sorted(group.rglob("*"), reverse=True):
                        if folder.is_dir():
                            folder.rmdir()
                    group.rmdir()
                    break
                time.sleep(0.1)
        finally:
            subprocess.run(["/bin/umount", "--lazy", mounted], check=True)
