"""Flower's ServerApp of the coordinator: reads what to run from the context, and runs the rounds."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.card import write_card
from server.gather import Gather
from server.receipts import LastReceipts
from server.round import Study, close_study, run_study
from shared_models.errors import ConfigError, FederationError
from shared_models.plan import read_plan

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study whose plan, folder and file of last receipts the context's run configuration names.

    The hospitals that may take part, with their identity keys, come in the context's state.

    Raises:
        FederationError: What stopped the study; it is in the journal too.
    """
    plan = read_plan(Path(str(context.run_config["plan"])))
    folder = Path(str(context.run_config["folder"]))
    identities = context.state.config_records["identities"]
    hospitals = {name: bytes.fromhex(str(key)) for name, key in identities.items()}
    if (folder / "events.jsonl").exists():
        raise ConfigError(
            f"study {plan.study} has run here before",
            hint=f"Give the new study another name, or move {folder} away; its hospitals have charged it already.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    receipts = LastReceipts(Path(str(context.run_config["receipts"])))
    study = Study(plan, hospitals, Gather(grid, frozenset(hospitals)), folder, receipts)
    try:
        statements = run_study(study)
        card = write_card(folder, plan, study.enrolled, statements)
    except FederationError as error:
        study.journal.write("failed", error=str(error), hint=error.hint)
        close_study(study)
        raise
    study.journal.write(
        "finished",
        model=str(folder / "model.safetensors"),
        card=str(card),
        hospitals={name: statement.model_dump(mode="json") for name, statement in statements.items()},
    )
