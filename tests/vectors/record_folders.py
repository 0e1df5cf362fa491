"""Record three hospitals' folders as a release leaves them in the middle of a study; for the upgrade from it.

Run it with that release's sources, and this file among them, once, before the release after it::

    cd SOURCES && PYTHONPATH=. python tests/vectors/record_folders.py folders_0_1_0.tar.xz

One study has ended. Another was approved, and hospital-1 has charged one of the three rounds that it reserved. The
archive has settings, keys, rosters, states and registries, what the release said of each budget, and both plans;
records are those of the example, and are not in it. The keys have signed nothing else, and are nobody's.
"""

import io
import json
import lzma
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from client.books import report
from shared_models.config import read_toml
from tests.federation import change_policy, changed, make_federation, restart_hospitals
from tests.rounds.test_a_server_that_lies import Coordinator

KEPT = ("hospitals", "public", "root", "last-receipts.json")
PRIVACY = {"epsilon": 0.9, "spare_charges": 0}


def record(target: Path) -> None:
    """All of it, into one archive."""
    with TemporaryDirectory() as folder:
        federation = make_federation(Path(folder) / "trial", hospitals=3, rounds=3)
        plans = [federation.plan, changed(federation.plan, study="second", privacy=PRIVACY)]
        federation.run()
        federation.plan = plans[1]
        for name in federation.names:
            change_policy(federation, name, maximum_epsilon_per_study=1.0)
        coordinator = Coordinator(federation)
        for name in federation.names:
            coordinator.propose(name)
        answer = coordinator.train()
        restart_hospitals()
        assert type(answer).__name__ == "Update", answer
        said = {
            "release": read_toml(Path("pyproject.toml"), "project")["project"]["version"],
            "made_at": str(federation.folder),
            "plans": [plan.model_dump(mode="json") for plan in plans],
            "budgets": {name: report(federation.settings(name)) for name in federation.names},
        }
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in KEPT:
                archive.add(federation.folder / name, name)
            content = json.dumps(said, indent=1).encode()
            about = tarfile.TarInfo("said.json")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        target.write_bytes(lzma.compress(packed.getvalue(), preset=9))


if __name__ == "__main__":
    record(Path(sys.argv[1]).absolute())
