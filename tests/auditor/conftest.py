"""Evidence of a real federation at two times: one study, and another one after it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Message

from client.bundle import export
from tests.federation import changed, make_federation, restart_hospitals

LOST = "hospital-4"


@dataclass(frozen=True)
class Told:
    """What an auditor was given.

    Attributes:
        root: File of the consortium's public key.
        early: Each hospital's bundle after the first study.
        late: The same after the second one.
        studies: The coordinator's folders of both.
        names: The studies' names.
    """

    root: Path
    early: dict[str, Path]
    late: dict[str, Path]
    studies: tuple[Path, Path]
    names: tuple[str, str]

    @property
    def everything(self) -> list[Path]:
        """The newest evidence of everybody."""
        return [*self.late.values(), *self.studies]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Two studies of four hospitals with releases; one hospital's network is gone from round 2 of the first one on."""
    folder = tmp_path_factory.mktemp("told")
    release = {"every": 1, "clip": 1.0, "noise_multiplier": 60.0, "bins": 20}
    privacy = {"noise_multiplier": 60.0, "epsilon": 0.5}
    federation = make_federation(folder, rounds=2, evaluation=release, privacy=privacy)

    def lose(hospital: str, reply: Message) -> Message | None:
        if hospital == LOST and len(federation.charges(hospital)) == 3:
            federation.wire.offline.add(hospital)
        return reply

    def bundles(when: str) -> dict[str, Path]:
        restart_hospitals()
        (folder / when).mkdir()
        paths = {name: folder / when / f"{name}.zip" for name in federation.names}
        for name, path in paths.items():
            export(federation.settings(name), path)
        return paths

    federation.wire.tamper = lose
    first = federation.run("first")
    early, name = bundles("early"), federation.plan.study
    federation.wire.tamper = lambda _, reply: reply
    federation.wire.offline.clear()
    federation.plan = changed(federation.plan, study="lungs", rounds=1)
    second = federation.run("second")
    late = bundles("late")
    yield Told(federation.settings(LOST).keys.root, early, late, (first, second), (name, "lungs"))
    restart_hospitals()
