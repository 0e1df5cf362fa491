"""Commands of ``konsil-hospital`` before and after studies: example data, and what becomes of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.usable import UsableModel

ModelFile = Annotated[Path, typer.Option("--model", help="A model.safetensors or a checkpoint of a study.")]
RecordsFolder = Annotated[Path, typer.Option("--records", help="Folder with manifest.toml and the data it names.")]
Bases = Annotated[
    list[Path] | None, typer.Option("--base", help="Copy of the pretrained base that the model or plan starts from.")
]


def example(
    name: Annotated[
        str,
        typer.Argument(help="breast-cancer, heart-disease, lung, pneumonia, note-specialty, or icu-mortality."),
    ],
    folder: Annotated[Path, typer.Argument(help="The hospital's folder; made if missing.")],
    part: Annotated[
        str | None, typer.Option("--hospital", help="Of heart-disease: cleveland, hungary, switzerland, long-beach.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A local copy of the file, or a folder with it; nothing is fetched.")
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Do not ask whether the licence is accepted.")
    ] = False,
    coordinator: Annotated[str, typer.Option(help="host:port of the coordinator.")] = "127.0.0.1:9092",
    epsilon: Annotated[float, typer.Option(help="Most that all studies together may cost a patient.")] = 4.0,
) -> None:
    """Write a hospital with public data: records and their manifest, a test part, settings with a policy, keys, ledger.

    The data's licence is shown first. What is fetched is held against a pinned digest before anything reads it.
    """
    from client.examples import find_example, write_hospital
    from shared_models.terminal import progress

    found = find_example(name)
    typer.echo(f"data      {found.source}\nlicence   {found.licence}")
    written = write_hospital(
        found,
        folder,
        part=part,
        data=data,
        accept=lambda: accept_licence or typer.confirm("Fetch it, and keep to this licence?"),
        say=progress(),
        coordinator=coordinator,
        epsilon=epsilon,
    )
    typer.echo(f"records   {folder / 'records'}: {written.patients} patients, declared as {written.public_size}")
    typer.echo(f"test      {folder / 'test'}: of no study")
    typer.echo(f"settings  {written.settings}; next: konsil-hospital check-data {written.settings}")


def predict(
    model: ModelFile,
    records: RecordsFolder,
    out: Annotated[Path, typer.Option("--out", help="File to write: .csv or .parquet.")],
    batch: Annotated[int, typer.Option(min=1, help="Records at once.")] = 1024,
    base: Bases = None,
) -> None:
    """Predict for every record of a folder, which needs no labels: one line per record, in the order of its file.

    The file names rows and patients as the hospital's own file does: it stays in the house.
    """
    from client.predict import predict_folder

    found = _load(model, base)
    counted = predict_folder(found, records, out, batch=batch)
    typer.echo(f"{out}: {counted.predicted} records predicted, {counted.left_out} left out for a missing value")
    typer.echo("It names rows and patients of this hospital: keep it in the house.")


def serve(
    model: ModelFile,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8300,
    token_file: Annotated[
        Path | None, typer.Option(help="What requests have to show; needed on any other address than loopback.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate; needed likewise.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    base: Bases = None,
) -> None:
    """Answer requests for predictions over HTTP, in JSON or as FHIR RiskAssessments, until Ctrl-C or SIGTERM."""
    import logging

    from shared_models.errors import ConfigError

    try:
        from client.serve import Place
        from client.serve import serve as answer
    except ImportError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed",
            hint="pip install --constraint deploy/constraints.txt 'konsil[serve]'",
        ) from None
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("konsil").setLevel(logging.INFO)
    answer(_load(model, base), Place(host, port, token_file, certificate, key))


def export(
    model: ModelFile,
    onnx: Annotated[Path, typer.Option("--onnx", help="File to write.")],
) -> None:
    """Write a model as ONNX, for runtimes without torch; its outputs are held against the network's first."""
    from client.export import OPSET, export_onnx

    worst = export_onnx(_load(model), onnx)
    typer.echo(f"{onnx}: opset {OPSET}; on made-up inputs within {worst:.1g} of the network")


def explain(
    model: ModelFile,
    records: RecordsFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder to write into; made if missing.")],
    rows: Annotated[str, typer.Option(help="Rows, as `predict` numbers them: 2,5-9. Default: the first.")] = "",
    most: Annotated[int, typer.Option(min=1, max=10_000, help="How many, where no rows are named.")] = 20,
    column: Annotated[
        str, typer.Option("--output", help="Which output, as `predict` names it. Default: of the predicted class.")
    ] = "",
    method: Annotated[str, typer.Option(help="occlusion (images) or integrated-gradients.")] = "",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write Parquet instead of CSV.")] = False,
    base: Bases = None,
) -> None:
    """Show what predictions rest on: columns, measurements, pixels or words. It stays in the house."""
    from client.explained import Chosen, explain_folder

    chosen = Chosen(_rows(rows), most=most, column=column, method=method)
    explained = explain_folder(_load(model, base), records, out, chosen, parquet=parquet)
    typer.echo(f"{out}: {explained} records explained. It is about single patients: keep it in the house.")


def _load(path: Path, bases: list[Path] | None = None) -> "UsableModel":
    """Read the model, and say what it is for."""
    from client.usable import load_model
    from shared_models.pretrained import offer_files

    offer_files(bases or ())
    model = load_model(path)
    typer.echo(f"model     {model.plan.study}: {model.task.name}, {model.plan.network.name}")
    typer.echo(f"use       {model.intended_use}")
    return model


def _rows(text: str) -> set[int] | None:
    """``2,5-9`` as numbers; None where nothing is said.

    Raises:
        ConfigError: It is something else.
    """
    from shared_models.errors import ConfigError

    if not text:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends):
            raise ConfigError(f"--rows {text!r} names no rows", hint="Numbers and ranges: --rows 2,5-9")
        span = range(int(ends[0]), int(ends[1]) + 1)
        if not 0 < len(span) <= 10_000:
            raise ConfigError(f"--rows {part.strip()!r} is empty, or has more than 10,000 rows", hint="--rows 2,5-9")
        found.update(span)
    return found


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (example, predict, serve, export, explain):
        app.command()(command)
