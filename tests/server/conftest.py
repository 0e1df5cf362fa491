"""Two studies to look at: one that has run for real, and one that waits and says so in hostile words."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
import tomli_w
from flwr.app import Message

from client.app import close_hospitals
from server.journal import Journal
from server.settings import Settings, Tls
from server.store import Store
from server.studies import Studies
from shared_models.config import read_toml
from tests.federation import Federation, changed, make_federation

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="hacked=1">"'&</svg></main>{{ 7 * 7 }}"""
WAITING = "waiting"


@dataclass(frozen=True)
class Seen:
    """A federation after its study, and a coordinator's settings beside its database."""

    federation: Federation

    @property
    def settings(self) -> Settings:
        """Settings without a page; the files of TLS are not there, because nothing on loopback needs them."""
        folder = self.federation.folder
        tls = Tls(ca=folder / "ca.pem", certificate=folder / "tls.pem", key=folder / "tls.key")
        return Settings(
            host="127.0.0.1", port=1, state=folder, tls=tls, roster=folder / "roster.json", root=folder / "root.pub"
        )

    @property
    def waiting(self) -> Journal:
        """The journal of the study that waits."""
        return Journal(self.federation.folder / WAITING / "events.jsonl")

    @contextmanager
    def studies(self) -> Iterator[Studies]:
        """The studies, to be looked at: nothing goes on with them."""
        with closing(Store(self.settings.database_url)) as store:
            yield Studies(store, self.federation.folder / "studies", lambda *_: None)


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Four rounds, with statistics after two of them; hospital-4 vanishes in the third and is back for the fourth."""
    folder = tmp_path_factory.mktemp("seen")
    evaluation = {"every": 2, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}
    privacy = {"noise_multiplier": 40.0, "spare_charges": 0}
    federation = make_federation(folder, rounds=4, privacy=privacy, evaluation=evaluation, purpose=HOSTILE)
    for hospital in federation.example.hospitals:
        manifest = hospital.folder / "manifest.toml"
        declared = {"validation_fraction": 0.3, "absent_classes": ["benign", "malignant"]}
        manifest.write_text(tomli_w.dumps(read_toml(manifest, "manifest") | declared), encoding="utf-8")

    def vanish(hospital: str, request: Message) -> None:
        number, stage = request.metadata.group_id, request.metadata.message_type
        if (number, hospital) == ("3", "hospital-4") and stage.startswith("train"):
            federation.wire.offline.add(hospital)
        elif number == "3" and stage.endswith("unmask"):
            federation.wire.offline.clear()

    federation.wire.on_request = vanish
    federation.run()
    close_hospitals()
    plan = changed(federation.plan, study=WAITING)
    found = Seen(federation)
    with closing(Store(found.settings.database_url)) as store:
        (folder / WAITING).mkdir()
        store.submit(plan, by="a test", folder=folder / WAITING)
    found.waiting.write("started", study=WAITING, plan_digest=plan.digest(), rounds=4, parameters=31)
    found.waiting.write("waiting", reason=HOSTILE)
    return found
