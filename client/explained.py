"""Explanations of a folder's records on the disk: one file of columns, and a picture for each image or series."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.draw import draw_image, draw_series
from client.explain import Attributions, by_column, explain
from client.records.manifest import read_manifest
from client.records.tabular import Inputs, read_inputs
from client.results import Writer, writing
from client.usable import UsableModel
from shared_models.errors import ConfigError
from shared_models.tasks import Choice, ImageInput, SeriesInput, Survival, TableInput, TokensInput
from shared_models.tokens import token, words

_AT_ONCE = 64


@dataclass(frozen=True)
class Chosen:
    """Which records, and which of their outputs.

    Attributes:
        rows: Numbers of rows, as predictions have them; None for the first ``most`` records.
        most: Of records, where no rows are named.
        column: Name of an output. Empty for the predicted class, or of two classes for the second; of several heads for
            the first head's first output, of two classes for the second, of survival for the last interval.
        method: As ``explain`` takes it.
    """

    rows: Collection[int] | None = None
    most: int = 20
    column: str = ""
    method: str = ""


def explain_folder(model: UsableModel, folder: Path, out: Path, chosen: Chosen, *, parquet: bool = False) -> int:
    """Explain predictions for records of a folder.

    Writes ``attributions.csv`` (or ``.parquet``) into ``out``: ``row``, ``patient``, ``explained`` (the output's name),
    ``output``, ``baseline``, ``unexplained``; then the attributions, in units of the output: of a table and of a series
    one column for each of the task's (of a series summed over time); of a text one line per word, with ``position``,
    ``word`` and ``attribution``. Of images and series a picture ``row-N.png`` each.

    Guarantees:
        * The folder and its files are for their owner alone. Words of texts are in no other file than this one.

    Returns:
        How many records were explained.

    Raises:
        RecordsError: The records do not fit the model's task, or an extra is not installed.
        ConfigError: There is no such output, method or row, or ``out`` cannot be written.
    """
    if chosen.column and chosen.column not in model.columns:
        raise ConfigError(
            f"the model has no output {chosen.column!r}", hint=f"Its outputs: {', '.join(model.columns)}."
        )
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}", hint="Choose another folder.") from None
    done: set[int] = set()
    with writing(out / f"attributions.{'parquet' if parquet else 'csv'}", _kinds(model)) as writer:
        for part in read_inputs(read_manifest(folder), model.task, at_once=_AT_ONCE):
            wanted = _wanted(part, chosen, len(done))
            if wanted:
                _explain_part(model, part, wanted, chosen, out, writer)
                done.update(part.rows[i] for i in wanted)
            if chosen.rows is None and len(done) >= chosen.most:
                break
    if chosen.rows is not None and (absent := sorted(set(chosen.rows) - done)):
        raise ConfigError(
            f"rows {', '.join(map(str, absent))} are not there, or were left out", hint="`predict` shows every row."
        )
    return len(done)


def _wanted(part: Inputs, chosen: Chosen, done: int) -> list[int]:
    """Positions in the part of the rows that are to be explained."""
    kept = [i for i, here in enumerate(part.kept) if here]
    if chosen.rows is not None:
        return [i for i in kept if part.rows[i] in chosen.rows]
    return kept[: max(0, chosen.most - done)]


def _explain_part(
    model: UsableModel, part: Inputs, wanted: Sequence[int], chosen: Chosen, out: Path, writer: Writer
) -> None:
    place = np.cumsum(part.kept) - 1  # of a row among those that are kept
    inputs = part.inputs[torch.from_numpy(place[list(wanted)])]
    column = _column(model, inputs, chosen)
    found = explain(model, inputs, column, method=chosen.method)
    rows = [part.rows[i] for i in wanted]
    names = [model.columns[i] for i in column.tolist()]
    about: dict[str, Sequence[object]] = {
        "row": rows,
        "patient": [part.patients[i] for i in wanted],
        "explained": names,
        "output": found.output.tolist(),
        "baseline": found.baseline.tolist(),
        "unexplained": found.unexplained.tolist(),
    }
    match model.task.input:
        case TableInput() as schema:
            writer.write(about | {name: values.tolist() for name, values in by_column(schema, found).items()})
        case SeriesInput() as series:
            sums = found.values.sum(axis=1).T.tolist()
            writer.write(about | {v.name: values for v, values in zip(series.variables, sums, strict=True)})
            _draw_series(model, series, inputs, found, rows, names, out)
        case ImageInput():
            writer.write(about)
            for number, row in enumerate(rows):
                image = inputs[number].double().numpy()
                title, foot = _said(model, row, names[number], found.output[number])
                draw_image(out / f"row-{row}.png", image, found.values[number], title=title, foot=foot)
        case TokensInput(vocabulary=vocabulary):
            texts = [part.texts[place[i]] for i in wanted]
            _write_words(about, found, inputs, texts, vocabulary, writer)


def _column(model: UsableModel, inputs: Tensor, chosen: Chosen) -> Tensor:
    """Which output of each record is explained."""
    if chosen.column:
        return torch.full((len(inputs),), model.columns.index(chosen.column))
    if model.task.choice is not None and len(model.task.choice.classes) > 2:
        with torch.inference_mode():
            return model.outputs(inputs).argmax(dim=1).clone()
    first = model.task.heads[0]
    place = 1 if isinstance(first, Choice) and len(first.classes) == 2 else 0
    return torch.full((len(inputs),), len(first.edges) - 1 if isinstance(first, Survival) else place)


def _draw_series(
    model: UsableModel,
    series: SeriesInput,
    inputs: Tensor,
    found: Attributions,
    rows: Sequence[int],
    names: Sequence[str],
    out: Path,
) -> None:
    variables = len(series.variables)
    for number, row in enumerate(rows):
        title, foot = _said(model, row, names[number], found.output[number])
        draw_series(
            out / f"row-{row}.png",
            found.values[number],
            (inputs[number, :, variables : 2 * variables] > 0).numpy(),
            [variable.name for variable in series.variables],
            step_unit=series.step_unit,
            title=title,
            foot=foot,
        )


def _write_words(
    about: Mapping[str, Sequence[object]],
    found: Attributions,
    inputs: Tensor,
    texts: Sequence[str],
    vocabulary: int,
    writer: Writer,
) -> None:
    """One line per word that the network read, as the tokens have it: numbers are blurred."""
    for number, text in enumerate(texts):
        ids = inputs[number].tolist()
        said = words(text)[: len(ids)]
        assert [token(word, vocabulary=vocabulary) for word in said] == ids[: len(said)]  # noqa: S101 - the same text
        writer.write(
            {
                **{name: [cells[number]] * len(said) for name, cells in about.items()},
                "position": list(range(len(said))),
                "word": said,
                "attribution": found.values[number, : len(said)].tolist(),
            }
        )


def _said(model: UsableModel, row: int, name: str, output: float) -> tuple[str, str]:
    """Title and foot of a picture."""
    return f"row {row}: {name} {output:.3f}", f"{model.plan.study}. {model.intended_use}"


def _kinds(model: UsableModel) -> dict[str, type]:
    kinds: dict[str, type] = {"row": int, "patient": str, "explained": str}
    kinds |= dict.fromkeys(("output", "baseline", "unexplained"), float)
    match model.task.input:
        case TableInput(columns=columns):
            return kinds | dict.fromkeys((column.name for column in columns), float)
        case SeriesInput(variables=variables):
            return kinds | dict.fromkeys((variable.name for variable in variables), float)
        case ImageInput():
            return kinds
        case TokensInput():
            return kinds | {"position": int, "word": str, "attribution": float}
