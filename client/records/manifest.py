"""The manifest: how a hospital's file answers a task's schema. Written by the hospital, read only here.

Example, ``manifest.toml`` beside the data::

    task = "heart-disease"
    file = "data.csv"
    label = "num"
    one_row_per_patient = true
    validation_fraction = 0.2

    [columns]                   # schema name = column of the file; left out where both are the same
    resting_blood_pressure = "trestbps"

    [categories.sex]            # code in the file = the schema's category; left out where both are the same
    0 = "female"
    1 = "male"
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from shared_models.config import Frozen, Name, explain, read_toml
from shared_models.errors import ConfigError, RecordsError
from shared_models.tasks import ImageInput, TableInput, Task

MANIFEST = "manifest.toml"
IMAGES = "images"  # the schema's one name for a task whose input is images
_HINT = "Mend the manifest; docs/hospital.md shows one with every key."


def _inside_the_folder(path: Path, info: ValidationInfo) -> Path:
    """Accept a file below the manifest's folder, never one that a link or ``..`` leads out to."""
    folder: Path = info.context["folder"] if info.context else Path()
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise ValueError("must be a relative path to a file inside the manifest's folder")
    if path.suffix not in {".csv", ".parquet", ".npz"}:
        raise ValueError("must end in .csv, .parquet or .npz")
    return folder / path


class Manifest(Frozen):
    """Where the records lie and what their columns mean.

    Attributes:
        task: Name of the task that these records are for.
        file: CSV (UTF-8, comma, one header row) or Parquet for tables, numpy's ``.npz`` for images; inside the
            manifest's folder.
        label: The file's label column; of an ``.npz`` file, as everywhere below, its array.
        validation_fraction: Share of the patients that is kept for validation, chosen by keyed hash of the id alone.
        columns: Schema name -> column of the file; a column that is left out has the schema's own name.
        categories: Schema name (or the label's) -> code in the file -> the schema's category.
        patient: Column that says which patient a row belongs to; a patient may have many rows.
        one_row_per_patient: Declares every row a patient of its own. With ``patient`` too, a repeated id is an error.
        missing_values: Texts that stand for "not known", besides an empty cell.
        incomplete_rows: What becomes of a row with a missing value: an error, or left out and counted.
        absent_classes: Classes that this hospital never sees; without this, their absence is an error.
    """

    task: Name
    file: Annotated[Path, AfterValidator(_inside_the_folder)]
    label: Annotated[str, Field(min_length=1)]
    validation_fraction: Annotated[float, Field(ge=0, le=0.9)]
    columns: Mapping[str, str] = {}
    categories: Mapping[str, Mapping[str, str]] = {}
    patient: Annotated[str, Field(min_length=1)] | None = None
    one_row_per_patient: bool = False
    missing_values: tuple[str, ...] = ()
    incomplete_rows: Literal["refuse", "leave-out"] = "refuse"
    absent_classes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _patients_are_declared(self) -> "Manifest":
        if self.patient is None and not self.one_row_per_patient:
            raise ValueError('name the patient column (patient = "...") or declare one_row_per_patient = true')
        return self

    def column(self, name: str) -> str:
        """The file's column for a name of the schema."""
        return self.columns.get(name, name)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``manifest.toml`` in a records folder, every error at once.

    Raises:
        RecordsError: It is missing, not TOML, or a key is unknown, missing or out of range.
    """
    path = folder / MANIFEST
    try:
        fields = read_toml(path, "manifest")
        return Manifest.model_validate_json(json.dumps(fields), context={"folder": folder})
    except ConfigError as error:
        raise RecordsError(str(error), hint=error.hint) from None
    except (ValidationError, TypeError, ValueError) as error:
        text = explain(error) if isinstance(error, ValidationError) else str(error)
        raise RecordsError(f"{path}: {text}", hint=_HINT) from None


def check_fits(manifest: Manifest, task: Task) -> TableInput | ImageInput:
    """Check the manifest's names against the task's schema, and return that schema.

    Raises:
        RecordsError: Another task, a task of a kind that is not read yet, a file of another kind than the task's, or a
            name that the schema does not have.
    """
    where = manifest.file.parent / MANIFEST
    if manifest.task != task.name:
        raise RecordsError(
            f"{where} is for task {manifest.task}, not {task.name}", hint="Point the study at its own records."
        )
    if not isinstance(task.input, TableInput | ImageInput):
        raise RecordsError(f"task {task.name} does not read tables", hint="Use records of the task's own kind.")
    if (manifest.file.suffix == ".npz") != isinstance(task.input, ImageInput):
        raise RecordsError(
            f"{where}: {manifest.file.name} is no file of the kind that task {task.name} reads",
            hint="Images come in a .npz file, tables in .csv or .parquet.",
        )
    names = {IMAGES} if isinstance(task.input, ImageInput) else {column.name for column in task.input.columns}
    unknown = [
        *(f"columns.{name}" for name in manifest.columns if name not in names),
        *(f"categories.{name}" for name in manifest.categories if name not in names | {task.label}),
        *(f"absent_classes: {name}" for name in manifest.absent_classes if name not in task.classes),
    ]
    if unknown:
        raise RecordsError(f"{where}: not in the schema of {task.name}: {', '.join(unknown)}", hint=_HINT)
    return task.input
