"""One attempt, driven by hand: hospitals and a coordinator in memory, stage by stage, and drop-outs where wanted."""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from shared_models.identity import public_bytes
from shared_models.secagg.key_agreement import Announcement, Roster
from shared_models.secagg.protocol import (
    Cohort,
    Coordinator,
    Delivery,
    Hospital,
    Positions,
    Survivors,
    Unmasking,
    smallest_threshold,
)

PLAN, ROSTER, PARAMETERS = "a" * 64, "b" * 64, "c" * 64
STAGES = (1, 2, 3, 4, 5)


@cache
def identity(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def names(count: int) -> list[str]:
    """Hospitals' names; not in the order of their numbers, so that sorting is seen to happen."""
    return [f"hospital-{7 * i % 97:02}-{i}" for i in range(count)]


def roster(members: Collection[str]) -> Roster:
    return Roster(ROSTER, {name: public_bytes(identity(name)) for name in members})


def announcement(members: Collection[str], /, **changes: Any) -> Announcement:
    fields: dict[str, Any] = {
        "purpose": "train",
        "study": "a-study",
        "plan_digest": PLAN,
        "roster_digest": ROSTER,
        "round": 1,
        "attempt": 1,
        "parameters_digest": PARAMETERS,
        "invited": tuple(members),
        "threshold": smallest_threshold(len(members)),
    }
    return Announcement(**fields | changes)


class Attempt:
    """Hospitals, a coordinator, and the latest message out. Each step takes those that are silent in it.

    Args:
        count: Hospitals.
        length: Entries of each vector.
        hospitals: Of an earlier attempt, to go on with.
        changes: Of the announcement.
    """

    def __init__(
        self, count: int = 5, length: int = 8, hospitals: Mapping[str, Hospital] | None = None, **changes: Any
    ) -> None:
        self.names = names(count)
        self.roster = roster([*self.names, "uninvited"])
        self.hospitals = dict(hospitals or {name: self.hospital(name) for name in self.names})
        self.announcement = announcement(self.names, **changes)
        self.coordinator = Coordinator(self.announcement, roster=self.roster, length=length)
        random = np.random.default_rng()
        self.encoded = {name: random.integers(0, 2**32, length, np.uint32) for name in self.names}
        self.uploads: dict[str, NDArray[np.uint32]] = {}
        self.cohort: Cohort
        self.deliveries: dict[str, Delivery]
        self.survivors: Survivors
        self.unmasking: Unmasking

    def hospital(self, name: str, **options: Any) -> Hospital:
        """A hospital that has taken part in nothing yet."""
        return Hospital(name, identity(name), roster=self.roster, **{"positions": Positions()} | options)

    def others(self, victim: str) -> list[str]:
        """All names but one."""
        return [name for name in self.names if name != victim]

    def advertise(self, silent: Collection[str] = ()) -> Cohort:
        """Stage 1."""
        for name in self._speaking(self.names, silent):
            keys = self.hospitals[name].advertise(self.announcement, plan_digest=PLAN)
            self.coordinator.receive_advertisement(name, keys)
        self.cohort = self.coordinator.cohort()
        return self.cohort

    def share(self, silent: Collection[str] = ()) -> dict[str, Delivery]:
        """Stage 2."""
        for name in self._speaking([member.hospital for member in self.cohort.members], silent):
            self.coordinator.receive_dealing(name, self.hospitals[name].share(self.cohort))
        self.deliveries = self.coordinator.deliveries()
        return self.deliveries

    def upload(self, silent: Collection[str] = ()) -> Survivors:
        """Stage 3."""
        for name in self._speaking(self.deliveries, silent):
            assert self.hospitals[name].accept(self.deliveries[name], parameters_digest=PARAMETERS) is None
            charge = f"{name} {self.announcement.context0.hex()}"
            self.uploads[name] = self.hospitals[name].upload(self.encoded[name].copy(), charge=charge)
            self.coordinator.receive_upload(name, self.deliveries[name].context, self.uploads[name])
        self.survivors = self.coordinator.survivors()
        return self.survivors

    def agree(self, silent: Collection[str] = ()) -> Unmasking:
        """Stage 4."""
        for name in self._speaking(self.survivors.uploaders, silent):
            self.coordinator.receive_agreement(name, self.hospitals[name].agree(self.survivors))
        self.unmasking = self.coordinator.unmasking()
        return self.unmasking

    def unmask(self, silent: Collection[str] = ()) -> NDArray[np.uint32]:
        """Stage 5, and the sum."""
        for name in self._speaking([agreement.hospital for agreement in self.unmasking.agreements], silent):
            self.coordinator.receive_revealed(name, self.hospitals[name].unmask(self.unmasking))
        return self.coordinator.total()

    def up_to(self, stage: int) -> "Attempt":
        """Go through all stages before ``stage``, nobody silent."""
        for step in (self.advertise, self.share, self.upload, self.agree)[: stage - 1]:
            step()
        return self

    def run(self, drop_outs: Mapping[str, int]) -> NDArray[np.uint32]:
        """All five stages; each named hospital is silent from its stage on."""
        for step, stage in zip((self.advertise, self.share, self.upload, self.agree), STAGES, strict=False):
            step([name for name, last in drop_outs.items() if last <= stage])
        return self.unmask([name for name, last in drop_outs.items() if last <= 5])

    def plain_sum(self, drop_outs: Mapping[str, int]) -> NDArray[np.uint32]:
        """What the sum must be: of those that uploaded, which whoever goes silent later still did."""
        uploaders = [name for name in self.names if drop_outs.get(name, 6) > 3]
        total: NDArray[np.uint32] = np.sum([self.encoded[name] for name in uploaders], axis=0, dtype=np.uint32)
        return total

    @staticmethod
    def _speaking(asked: Collection[str], silent: Collection[str]) -> list[str]:
        return [name for name in asked if name not in silent]
