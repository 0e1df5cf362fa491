"""Flower's ServerApp of the coordinator: one study, from where it is to its end."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.card import write_card
from server.gather import Gather
from server.halt import Halt, HaltedError
from server.receipts import LastReceipts
from server.round import close_study, run_study
from server.store import State, Store, StudyRow, Wish
from server.study import Registered, Study
from server.turns import Turns
from shared_models.errors import ConfigError, FederationError, IdentityError, StoreError
from shared_models.plan import read_plan

# What is wrong with the coordinator's disk, database or roster is no fault of the study's: it waits until it is mended.
OUTSIDE = (StoreError, ConfigError, IdentityError, OSError)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study whose plan, folder, database and file of last receipts the context's run configuration names.

    The hospitals that may take part come in the context's state: their identity keys and public sizes.

    Raises:
        FederationError: What stopped the study; it is in the journal too.
    """
    config = {key: str(value) for key, value in context.run_config.items()}
    sizes = context.state.config_records["public_sizes"]
    members = {
        name: Registered(bytes.fromhex(str(key)), int(str(sizes[name])))
        for name, key in context.state.config_records["identities"].items()
    }
    with closing(Store(config["database"])) as store:
        row = store.submit(read_plan(Path(config["plan"])), by="local", folder=Path(config["folder"]))
        receipts = LastReceipts(Path(config["receipts"]))
        conduct(row, grid, lambda: members, receipts, store, Turns(), Halt(), patient=False)


def conduct(
    row: StudyRow,
    grid: Grid,
    members: Callable[[], Mapping[str, Registered]],
    receipts: LastReceipts,
    store: Store,
    turns: Turns,
    halt: Halt,
    *,
    patient: bool,
) -> None:
    """Run one study from where it is to its end, and write down how it ended.

    Raises:
        FederationError: What stopped the study; it is in the journal and in the database too.
    """
    row.folder.mkdir(parents=True, exist_ok=True)
    gather = Gather(grid, frozenset(), halt)
    study = Study(
        row.plan, members, gather, row.folder, receipts, store, turns, halt, number=row.number, patient=patient
    )
    try:
        statements = run_study(study)
        card = write_card(row.folder, row.plan, study.enrolled, statements)
    except HaltedError:
        _halted(study)
        return
    except OUTSIDE as error:
        if not patient:
            raise
        study.journal.write("interrupted", error=str(error))
        study.enter(State.PAUSED, f"interrupted, and tried again by itself: {error}")
        raise
    except FederationError as error:
        study.journal.write("failed", error=str(error), hint=error.hint)
        study.enter(State.FAILED, str(error))
        close_study(study)
        raise
    finally:
        turns.give_back(row.name)
    study.journal.write(
        "finished",
        model=str(row.folder / "model.safetensors"),
        card=str(card),
        hospitals={name: statement.model_dump(mode="json") for name, statement in statements.items()},
    )
    study.enter(State.FINISHED)


def _halted(study: Study) -> None:
    """What an operator wished has come to pass; where nobody wished anything, the coordinator ends and comes back."""
    wish = study.store.study(study.plan.study).wish
    if wish is Wish.STOP:
        study.gather.halt = Halt()  # the stop is over; hospitals have to hear of it
        study.journal.write("stopped")
        study.enter(State.STOPPED, "by an operator")
        close_study(study)
    elif wish is Wish.PAUSE:
        study.journal.write("paused", reason="by an operator")
        study.enter(State.PAUSED, "by an operator")
