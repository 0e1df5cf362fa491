"""The command ``konsil-hospital``. Torch and Flower are imported inside the commands that need them."""

import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client import cli_enrol
from shared_models import terminal

if TYPE_CHECKING:
    from client.settings import Settings

app = typer.Typer(
    help="One hospital: trains the shared model next to its data, under its own policy and privacy budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli_enrol.add_to(app)

SettingsFile = Annotated[Path, typer.Argument(help="The hospital's settings, hospital.toml.")]
RecordsFolder = Annotated[Path, typer.Option("--records", help="Folder with manifest.toml and the data it names.")]


@app.command()
def start(settings_file: SettingsFile) -> None:
    """Run the daemon: connect to the coordinator, answer rounds, until stopped with Ctrl-C or SIGTERM.

    Dials out only; opens no port. A coordinator that isn't there is tried again, with back-off, until it is.
    """
    from client import app as flower_app
    from client.daemon import serve
    from client.settings import read_settings

    settings = read_settings(settings_file)
    _log(settings)
    _use(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        flower_app.hospital_at(str(settings_file))  # a ledger or a key that is wrong stops us before we connect
        serve(settings, settings_file, flower_app.app, until=threading.Event())
    finally:
        flower_app.close_hospitals()


@app.command("check-data")
def check_data(
    settings_file: Annotated[Path | None, typer.Argument(help="The hospital's settings, hospital.toml.")] = None,
    records: Annotated[Path | None, typer.Option("--records", help="Instead: a folder with manifest.toml.")] = None,
) -> None:
    """Read the records as a study would, and print counts, missing values and ranges. Nothing leaves this machine."""
    from rich.console import Console

    from client.keys import split_key
    from client.records.report import describe
    from client.settings import read_settings
    from shared_models.errors import ConfigError

    if (settings_file is None) == (records is None):
        raise ConfigError(
            "check-data needs a settings file or --records", hint="konsil-hospital check-data hospital.toml"
        )
    if settings_file is not None:
        settings = read_settings(settings_file)
        Console().print(describe(settings.records, split_key=split_key(settings.state), opt_out=settings.opt_out))
    elif records is not None:
        Console().print(describe(records))


@app.command()
def budget(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this hospital's patients' privacy budget has paid for, and what is left. Reads the ledger only."""
    from client.books import report
    from client.settings import read_settings

    found = report(read_settings(settings_file))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for line in _budget_lines(found):
        typer.echo(line)


@app.command()
def withdraw(
    settings_file: SettingsFile, study: Annotated[str, typer.Argument(help="Name of the approved study.")]
) -> None:
    """Leave a study for good: what it reserved and never charged is free again. The daemon must be stopped.

    What was charged stays charged, and the study's name cannot be approved here again.
    """
    from client.books import Books
    from client.settings import read_settings

    settings = read_settings(settings_file)
    books = Books.open(settings)
    try:
        books.budget.finish(study)
        typer.echo(f"study {study} is closed; epsilon {books.budget.left():.4f} is neither spent nor reserved")
    finally:
        books.close()


@app.command("train-alone")
def train_alone(
    plan_file: Annotated[Path, typer.Argument(help="A study plan; its task, network and seed are used.")],
    records: RecordsFolder,
    out: Annotated[Path, typer.Option("--out", help="Where to write the model (safetensors).")],
    test: Annotated[Path | None, typer.Option("--test", help="Records folder to measure the model on.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 3000,
    learning_rate: Annotated[float, typer.Option(help="Step size of plain SGD.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per step.")] = 32,
) -> None:
    """Train on this folder alone, without privacy and without a network: a baseline to compare a study with.

    The model stays here. It has no privacy guarantee: do not give it away.
    """
    from client.alone import evaluate_folder, train_folder
    from shared_models.plan import read_plan

    plan = read_plan(plan_file)
    train_folder(plan, records, out, steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    if test is not None:
        typer.echo(json.dumps(evaluate_folder(out, test)))


@app.command()
def evaluate(
    records: RecordsFolder,
    model: Annotated[
        Path | None, typer.Argument(help="A model file; without it, paths come on standard input.")
    ] = None,
) -> None:
    """Measure models on local records, without noise: one line of JSON per model. For the hospital's own eyes.

    Without MODEL it stays warm and reads one path per line from standard input.
    """
    from client.alone import evaluate_folder

    if model is not None:
        typer.echo(json.dumps(evaluate_folder(model, records)))
        return
    for line in sys.stdin:
        path = Path(line.strip())
        if path.exists():  # a study drops old checkpoints; one that is gone has a newer one behind it
            typer.echo(json.dumps({"model": str(path), **evaluate_folder(path, records)}))
            sys.stdout.flush()


def _log(settings: "Settings") -> None:
    """Log to standard error and to a file in the state folder: counts, rounds and digests, never records."""
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(settings.state / "hospital.log", encoding="utf-8"),
    ]
    text = f"%(asctime)s {settings.name} %(levelname)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=text, handlers=handlers, force=True)
    logging.getLogger("konsil").setLevel(logging.INFO)


def _use(settings: "Settings") -> None:
    """Give torch the threads that the settings allow."""
    import torch

    torch.set_num_threads(settings.threads)


def _budget_lines(report: dict[str, Any]) -> list[str]:
    population = report["population"]
    lines = [
        f"population {population['name']} ({population['public_size']} patients, declared)",
        f"budget     epsilon {population['epsilon']:g} at delta {population['delta']:g} per {report['unit']}, "
        f"{report['neighbouring']}, enforced by a Renyi filter at order {population['order']}",
        f"spent      epsilon {report['epsilon_filter']:.4f} (filter, enforced)",
        f"left       epsilon {report['epsilon_left']:.4f} (neither spent nor reserved)",
    ]
    lines += [
        f"study      {s['study']}: {s['rounds']} charges, epsilon {s['epsilon_filter']:.4f} (filter, enforced); "
        f"epsilon {s['epsilon']:.4f} at delta {s['delta']:g} ({s['accountant']}, {s['note']})"
        for s in report["studies"]
    ]
    return lines


def main() -> None:
    """Entry point of ``konsil-hospital``."""
    terminal.run(app)


if __name__ == "__main__":
    main()
