"""What secure aggregation adds to a whole round of the demo, beside empty exchanges with the same hospitals.

The coordinator runs in this process; the hospitals are daemons, over mutual TLS, with the demo's default study. After
each round as many empty exchanges are timed: one small question to every hospital, and its small answer, over the same
connections. Added by secure aggregation are the stages that a plain round would not have (agreeing on keys, sharing,
agreeing on survivors, unmasking), all arithmetic at the coordinator around them, and what a hospital does in stage 3 to
check its shares, encode and mask, which is measured by itself. The first round warms up and is left out.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from secure_aggregation import Federation, least_time

from client.randomness import SecureRandom
from server.coordinator import SuperLink
from server.demo import fit_plan, free_port, lay_out, start_hospital
from server.examples import write_example
from server.gather import Gather
from server.halt import Halt
from server.members import registered
from server.processes import Children
from server.quorum import enrol_enough
from server.receipts import LastReceipts
from server.round import close_study, secure_sum
from server.settings import read_settings
from server.store import Store
from server.study import Registered, Study
from server.turns import Turns
from shared_models.encoding import encoding
from shared_models.errors import FederationError
from shared_models.messages import StudyEnd

HOSPITALS, EXCHANGES, ALLOWANCE_S = 4, 4, 0.2
NOTHING = StudyEnd(study="no-such-study", plan_digest="0" * 64)  # the hospital looks it up, and says no


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Figures of one study."""
    example = write_example("breast-cancer", folder / "data", hospitals=HOSPITALS, seed=0)
    plan = fit_plan(example, rounds + 1)
    lay_out(folder, example, plan, free_port())
    settings = read_settings(folder / "coordinator" / "coordinator.toml")
    members = {m.name: Registered(bytes.fromhex(m.identity), m.public_size) for m in registered(settings)}
    added, stages, empty = [], [], []
    with Children(folder / "logs") as children, SuperLink(settings) as link, link.run() as grid:
        for hospital in example.hospitals:
            start_hospital(children, folder, hospital.name)
        (folder / "study").mkdir()
        store = Store(settings.database_url)
        store.submit(plan, by="the benchmark", folder=folder / "study")
        study = Study(
            plan,
            lambda: members,
            Gather(grid, frozenset(members)),
            folder / "study",
            LastReceipts(folder / "last.json"),
            store,
            Turns(),
            Halt(),
        )
        enrol_enough(study)
        for number in range(1, rounds + 2):
            started = time.perf_counter()
            found = secure_sum(study, "train", number, sorted(members))
            seconds = time.perf_counter() - started
            if found.uploaders != set(members):
                raise FederationError("a hospital missed a round: its time says nothing", hint="See its log.")
            if number > 1:
                added.append(seconds - found.seconds["train"])
                stages.append(found.seconds)
                empty += [empty_exchange(study) for _ in range(EXCHANGES)]
        close_study(study)
    alone = hospital_work(encoding(plan, "train", parameters=len(study.parameters), hospitals=HOSPITALS).length)
    for stage in stages[0]:
        print(f"stage {stage:<10} {median(each[stage] for each in stages):.4f} s")
    return {
        "round_overhead_s": median(added) + alone,
        "round_overhead_s_max": max(added) + alone,
        "hospital_work_s": alone,
        "empty_exchange_s": median(empty),
        "round_overhead_limit_s": EXCHANGES * median(empty) + ALLOWANCE_S,
    }


def empty_exchange(study: Study) -> float:
    """Seconds of asking every hospital something that costs it nothing."""
    started = time.perf_counter()
    answers = list(study.gather.ask(dict.fromkeys(study.hospitals, (NOTHING, None)), group="empty", deadline_s=30))
    if len(answers) != len(study.hospitals):
        raise FederationError("a hospital did not answer", hint="See its log.")
    return time.perf_counter() - started


def hospital_work(length: int) -> float:
    """Seconds of one hospital's stage 3 without the training: check the shares, quantize, mask."""
    runs = HOSPITALS
    waiting = []
    for _ in range(runs):
        federation = Federation(HOSPITALS, length)
        federation.advertise()
        for name, hospital in federation.hospitals.items():
            federation.coordinator.receive_dealing(name, hospital.share(federation.cohort))
        first = next(iter(federation.hospitals.values()))
        waiting.append((first, federation.coordinator.deliveries()[first.name]))

    def work() -> None:
        hospital, delivery = waiting.pop()
        hospital.accept(delivery, parameters_digest="c" * 64)
        coins = SecureRandom.from_system().uniform(length)
        hospital.upload(np.floor(coins).astype(np.uint32), charge="a-charge")

    return least_time(work, runs)


def main() -> None:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="rounds counted, after the first (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    with tempfile.TemporaryDirectory(prefix="konsil-bench-", ignore_cleanup_errors=True) as folder:
        try:
            figures = measure(Path(folder), options.rounds)
        except FederationError as error:
            sys.exit(f"error: {error}\nhint: {error.hint}")
    overhead, limit = figures["round_overhead_s"], figures["round_overhead_limit_s"]
    met = "met" if overhead <= limit else "MISSED"
    figures["round_overhead_over_limit"] = overhead / limit
    print(f"an empty exchange with {HOSPITALS} hospitals: {figures['empty_exchange_s']:.4f} s")
    print(
        f"secure aggregation adds {overhead:.3f} s to a round (at most {figures['round_overhead_s_max']:.3f}), "
        f"target <= {EXCHANGES} empty exchanges + {ALLOWANCE_S} s = {limit:.3f} s: {met}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
