"""The command ``konsil-coordinator``. Torch and Flower are imported inside the commands that need them."""

import logging
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from server import cli_control, cli_enrol, cli_operate, cli_report, logs
from shared_models import terminal

app = typer.Typer(
    help="The coordinator: runs studies over hospitals, averages their encrypted updates, hands out the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli_enrol.add_to(app)
cli_control.add_to(app)
cli_report.add_to(app)
cli_operate.add_to(app)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The study plan (TOML).")],
    settings_file: Annotated[Path, typer.Option("--settings", help="The coordinator's settings, coordinator.toml.")],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where model, card, checkpoints and journal go; by default in the state."),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON, whatever the settings say.")] = False,
) -> None:
    """Run one study to its end: wait for the hospitals, train, write the model and its card.

    Interrupted or killed, it goes on where it was when it is given again.
    """
    from server.coordinator import run_study
    from server.settings import read_settings

    settings = read_settings(settings_file)
    _log_to_terminal("json" if log_json else settings.log_format)
    run_study(settings, plan, folder and folder.absolute())


def _log_to_terminal(form: logs.Format = "text") -> None:
    logs.to_terminal("coordinator", form)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@app.command()
def example(
    study: Annotated[str, typer.Argument(help="breast-cancer, or heart-disease (needs KONSIL_DATA).")],
    folder: Annotated[Path, typer.Argument(help="Where to write; made if missing.")],
    hospitals: Annotated[int, typer.Option(min=3, max=20, help="Hospitals; heart-disease has four.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the artificial split into hospitals.")] = 0,
) -> None:
    """Write an example study's data: a records folder per hospital, one with all of it, and one for testing."""
    from server.examples import write_example

    typer.echo(write_example(study, folder.absolute(), hospitals=hospitals, seed=seed).split)


@app.command()
def demo(
    study: Annotated[str, typer.Option(help="breast-cancer, or heart-disease (needs KONSIL_DATA).")] = "breast-cancer",
    rounds: Annotated[int | None, typer.Option(min=1, max=1000, help="Rounds; the noise is fitted to them.")] = None,
    hospitals: Annotated[int, typer.Option(min=3, max=20, help="Hospitals; heart-disease has four.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where everything goes; must not exist. Default: konsil-demo/STUDY-TIME.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the coordinator; default: a free one.")
    ] = None,
    page: Annotated[
        int | None, typer.Option("--page", min=1, max=65535, help="Also serve the page, on this port of 127.0.0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the artificial split into hospitals.")] = 0,
) -> None:
    """Play everybody on this machine: coordinator and hospitals as processes over TLS, one study end to end."""
    from rich.console import Console

    from server.demo import Options, run_demo

    now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    target = folder or Path("konsil-demo") / f"{study}-{now}"
    options = Options(study, rounds, hospitals, target, json_file, port, seed, page)
    run_demo(options, Console())


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(help="The study plan (TOML).")],
    records: Annotated[
        Path | None, typer.Option(help="Folder of the hospitals' records folders; without it records are made up.")
    ] = None,
    hospitals: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Hospitals to make up, or to take from --records; there, all.")
    ] = None,
    patients: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of each made-up hospital.")] = 100,
    public_size: Annotated[
        int | None, typer.Option(min=1, help="Declared for each hospital of --records; not for `example` data.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where everything goes; must not exist. Default: konsil-simulation/STUDY-TIME.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of made-up records; never of noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of torch.")] = 1,
    folds: Annotated[
        int | None, typer.Option(min=2, max=20, help="Cross-validate: a study for each fold, each charged in full.")
    ] = None,
    base: Annotated[
        list[Path] | None, typer.Option(help="Copy of a pretrained base that the plan starts from; everybody's.")
    ] = None,
) -> None:
    """Run a study with many hospitals in this one process: masks, ledgers and privacy as ever, no network."""
    from rich.console import Console

    from server.simulate import Options, run_simulation

    logs.to_terminal("simulation")
    logging.getLogger("konsil").setLevel(logging.WARNING)  # of every hospital's rounds the result is enough
    now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    options = Options(
        plan=plan,
        folder=folder or Path("konsil-simulation") / f"{plan.stem}-{now}",
        records=records,
        hospitals=hospitals,
        patients=patients,
        public_size=public_size,
        seed=seed,
        threads=threads,
        json_file=json_file,
        folds=folds,
        bases=tuple(base or ()),
    )
    run_simulation(options, Console())


def main() -> None:
    """Entry point of ``konsil-coordinator``."""
    terminal.run(app)


if __name__ == "__main__":
    main()
