"""A study runs to its end: every hospital answers every round, pays for it, and the model learns."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from client.alone import evaluate_folder
from client.round import Hospital
from shared_models.messages import Proposal, StudyEnd
from shared_models.model_file import read_model
from shared_models.privacy.mechanisms import training_mechanism
from shared_models.update import parameters_to_vector
from tests.federation import Federation, make_federation
from tests.rounds.plain_training import plain_sgd, reference, switch_privacy_off


def test_every_round_is_answered_paid_for_and_recorded(federation: Federation) -> None:
    """Three rounds are three charges at each hospital, three events, and one model that explains itself."""
    folder = federation.run()

    assert [event["answered"] for event in federation.events("round")] == [federation.names] * 3
    for name in federation.names:
        assert federation.charges(name) == [(1, 1), (2, 1), (3, 1)]
    plan, _ = read_model(folder / "model.safetensors")
    assert plan == federation.plan
    (finished,) = federation.events("finished")
    assert set(finished["hospitals"]) == set(federation.names)
    assert "epsilon" in (folder / "card.md").read_text(encoding="utf-8")
    engines = json.loads((folder / "card.json").read_text(encoding="utf-8"))["engines"]
    assert engines == dict.fromkeys(federation.names, "book-keeping")


def test_the_charge_is_on_disk_before_the_reply_is_made_and_the_receipt_names_it(federation: Federation) -> None:
    """Each receipt's hash is a charge in the hospital's own ledger, for the mechanism that its plan states."""
    folder = federation.run()

    receipts = [json.loads(line) for line in (folder / "receipts.jsonl").read_bytes().splitlines()]
    assert len(receipts) == 3 * len(federation.names)
    for kept in receipts:
        charges = {e.hash: e for e in federation.ledger(kept["hospital"]) if e.kind == "charge"}
        charge = charges[kept["upload"]["receipt"]["entry_hash"]]
        size = federation.settings(kept["hospital"]).population.public_size
        assert charge.mechanism == training_mechanism(federation.plan, size)
        assert charge.round == kept["upload"]["round"]


def test_the_model_learns_under_noise(tmp_path: Path) -> None:
    """The default study, whole, tells malignant from benign far better than chance: most noise draws give 0.98."""
    federation = make_federation(tmp_path)

    folder = federation.run()

    assert evaluate_folder(folder / "model.safetensors", federation.example.test)["auroc"] > 0.95


def test_epsilon_grows_with_every_round_and_stays_within_the_plan(federation: Federation) -> None:
    """What the hospitals state never falls and never passes what the plan promised."""
    federation.run()

    for before, after in pairwise(federation.events("round")):
        for name in federation.names:
            assert before["epsilon_filter"][name] < after["epsilon_filter"][name] <= federation.plan.privacy.epsilon


# Honesty: with noise and clipping off, the federation is plain FedAvg


@pytest.mark.parametrize("network", [{"name": "logistic-regression"}, {"name": "mlp", "hidden": [8]}])
def test_without_noise_and_clipping_it_is_plain_fedavg(
    tmp_path: Path, network: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Message passing, weighting, bounding and averaging add nothing of their own: equal to 1e-5."""
    # The clip only sets how long an update may be; with privacy off it must not bind.
    changes: dict[str, Any] = {"training": {"learning_rate": 0.05}, "privacy": {"clip": 10.0}}
    federation = make_federation(tmp_path, rounds=3, network=network, **changes)
    switch_privacy_off(federation, monkeypatch)

    _, model = read_model(federation.run() / "model.safetensors")

    np.testing.assert_allclose(parameters_to_vector(model), reference(federation, [0.05] * 3, plain_sgd), atol=1e-5)


def test_a_hospital_states_where_its_gradients_came_from_if_not_from_book_keeping(federation: Federation) -> None:
    """By the layers of the network that it trained; also after a restart, when the network is made once more."""
    plan, proposal = federation.plan, Proposal(plan=federation.plan.model_dump(mode="json"))
    end = StudyEnd(study=plan.study, plan_digest=plan.digest())
    first, second = (Hospital.open(federation.settings_file(name)) for name in federation.names[:2])
    for hospital in (first, second):
        hospital.enrol(proposal)
    layer = next(module for module in first._studies[plan.study].model.modules() if isinstance(module, nn.Linear))
    foreign = layer.register_forward_hook(lambda *_: None)  # hospitals of a process share the network

    hooked = first.finish(end)
    foreign.remove()
    plain, again = second.finish(end), first.finish(end)
    for hospital in (first, second):
        hospital.close()

    assert hooked.engine == "opacus-hooks"
    assert plain.engine is None
    assert "engine" not in plain.model_dump_json()
    assert again.engine is None  # made once more, without the hook
