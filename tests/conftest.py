"""What every test shares: what a test opened and how it logged ends with it; and a database server."""

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.federation import Federation, make_federation, restart_hospitals

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").exists() else []

torch.set_num_threads(1)  # fixtures of a module train before any of a test: two threads would wait for each other


def pytest_configure(config: pytest.Config) -> None:
    """Measure the coverage of the processes that run tests: commands that tests start run as users run them."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture(autouse=True)
def _close_hospitals() -> Iterator[None]:
    torch.set_num_threads(1)  # a test may have chosen others
    yield
    restart_hospitals()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Commands choose what is logged, which is right for a process and outlasts a test that runs them in its own."""
    loggers = [logging.getLogger(), logging.getLogger("konsil")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Four hospitals, three rounds of the default study."""
    return make_federation(tmp_path, rounds=3)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of this test run's own, on a socket in a temporary folder.

    Not in pytest's folder: a second run of pytest closes that to other users, and the server is one.
    """
    if not POSTGRES:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install konsil[postgresql]")
    folder, binaries = Path(tempfile.mkdtemp(prefix="konsil-postgres-")), POSTGRES[-1]
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    data = folder / "data"
    made = [*as_user, str(binaries / "initdb"), "-D", str(data), "--auth", "trust", "--username", "konsil", "--no-sync"]
    subprocess.run(made, check=True, capture_output=True)
    options = f"-c listen_addresses= -c unix_socket_directories={folder}"
    control = [*as_user, str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    log = str(folder / "log")
    subprocess.run([*control, "-l", log, "-o", options, "start"], check=True, capture_output=True)
    yield f"postgresql+psycopg://konsil@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True)
    shutil.rmtree(folder)
