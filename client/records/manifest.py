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

``file`` has one row per record. What a record is made of stands in its row (tables, text), in files that the row names
(images, signals), or in a second file in long form (series).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from shared_models.config import Frozen, Name, explain, read_toml
from shared_models.errors import ConfigError, RecordsError
from shared_models.tasks import Choice, ImageInput, SeriesInput, TableInput, Task, TokensInput

MANIFEST = "manifest.toml"
# The schema's one name for what a record holds, where it holds no columns.
IMAGES, SIGNALS, TEXT = "images", "signals", "text"
ROWS = (".csv", ".parquet", ".jsonl", ".sql", ".ndjson")  # files with a row per record
_HINT = "Mend the manifest; docs/hospital.md shows one with every key."

Column = Annotated[str, Field(min_length=1)]


def _inside(path: Path, info: ValidationInfo, suffixes: tuple[str, ...]) -> Path:
    """Accept a file below the manifest's folder, never one that a link or ``..`` leads out to."""
    folder: Path = info.context["folder"] if info.context else Path()
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise ValueError("must be a relative path to a file inside the manifest's folder")
    if path.suffix not in suffixes:
        raise ValueError(f"must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    return folder / path


def _records_file(path: Path, info: ValidationInfo) -> Path:
    return _inside(path, info, (".npz", *ROWS))


def _long_form_file(path: Path, info: ValidationInfo) -> Path:
    return _inside(path, info, (".csv", ".parquet"))


def _ndjson_file(path: Path, info: ValidationInfo) -> Path:
    return _inside(path, info, (".ndjson", ".jsonl"))


def _beside(path: Path, info: ValidationInfo) -> Path:
    """A path that may lie anywhere; a relative one begins at the manifest's folder."""
    return (info.context["folder"] if info.context else Path()) / path


class Pictures(Frozen):
    """How files of pictures become images of the task's size: section ``[images]``.

    Attributes:
        window: Centre and width of the grey values that are shown, in the file's own unit (Hounsfield for CT). Public,
            and best the same at all hospitals. Without it a DICOM file's own window is used, or, where it has none,
            the whole range that its format can hold; NIfTI, which has no such range, needs it.
        resize: Pictures of another size than the task's: refused; padded to its shape with black and scaled; or scaled
            in both directions as needed.
        axis: Along which axis of the body a volume is cut.
        slice: Which slice of a volume: 0 is the first, 1 the last.
        slice_column: Column that says it for each record, in place of ``slice``.
        projection: In place of a slice all of them at once: the brightest pixel along the axis, or the mean, of what
            the window shows.
        blank: Rectangles ``[top, left, bottom, right]`` of pixels that are made black before anything else, because
            something is written there.
        pixels_checked: Declares that somebody looked at the pixels: no text is burned into them.
    """

    window: Annotated[tuple[float, Annotated[float, Field(gt=0)]], Field()] | None = None
    resize: Literal["refuse", "pad", "stretch"] = "refuse"
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    slice: Annotated[float, Field(ge=0, le=1)] | None = None
    slice_column: Column | None = None
    projection: Literal["maximum", "mean"] | None = None
    blank: tuple[tuple[int, int, int, int], ...] = ()
    pixels_checked: bool = False

    @model_validator(mode="after")
    def _one_slice_or_all(self) -> "Pictures":
        if sum(choice is not None for choice in (self.slice, self.slice_column, self.projection)) > 1:
            raise ValueError("slice, slice_column and projection exclude each other")
        return self


class LongForm(Frozen):
    """Measurements in long form, one per row: section ``[series]``.

    Attributes:
        file: CSV or Parquet inside the manifest's folder, read in parts.
        record: Column of both files that says which record a measurement belongs to.
        time: Column with the time of a measurement: a number in the task's step unit since the record's start; or, with
            ``start``, an ISO 8601 time.
        variable: Column that names the variable.
        value: Column with the value.
        start: Column of the manifest's ``file`` with the ISO 8601 time at which a record begins.
        absent_variables: Variables of the task that this hospital never measures; without this, it is an error.
    """

    file: Annotated[Path, AfterValidator(_long_form_file)]
    record: Column
    time: Column
    variable: Column
    value: Column
    start: Column | None = None
    absent_variables: tuple[str, ...] = ()


class Sql(Frozen):
    """Where a query goes: section ``[sql]``.

    Attributes:
        url_file: File of mode 0600 whose one line is SQLAlchemy's URL of the database: it may hold a password.
    """

    url_file: Annotated[Path, AfterValidator(_beside)]


Codes = Column | Annotated[tuple[Column, ...], Field(min_length=1)]


def _several(codes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (codes,) if isinstance(codes, str) else codes


class Observation(Frozen):
    """A column from FHIR Observations, or from components of Observations such as a blood pressure's.

    Attributes:
        code: ``system|code``, as in ``http://loinc.org|8867-4``, or several, any of which counts; one that ends in
            ``*`` stands for all codes that begin so.
        unit: UCUM code that a quantity must have; none for values of other kinds.
        take: Which observation of a patient counts, by its effective time.
    """

    code: Codes
    unit: str | None = None
    take: Literal["newest", "oldest"] = "newest"

    @property
    def codes(self) -> tuple[str, ...]:
        """All of them."""
        return _several(self.code)


class Condition(Frozen):
    """A column from FHIR Conditions: whether a patient has one.

    Attributes:
        code: As for ``Observation``.
        clinical: Whether only those count that are there now, by ``clinicalStatus``: active, recurrence, relapse.
    """

    code: Codes
    clinical: Literal["any", "active"] = "any"

    @property
    def codes(self) -> tuple[str, ...]:
        """All of them."""
        return _several(self.code)


class Fhir(Frozen):
    """Columns from a FHIR bulk export (NDJSON): section ``[fhir]``; the manifest's ``file`` holds the Patients.

    Attributes:
        files: Files with Observations and Conditions, inside the manifest's folder, read line by line.
        date: Day, ``YYYY-MM-DD``, at which ages are computed.
        patient: Column = element of Patient: ``gender``, ``age`` (whole years at ``date``), ``deceased`` (yes or no).
        observation: Column = which observation's value.
        condition: Column = codes of a condition: ``yes`` if a patient has one, else ``no``.
    """

    files: tuple[Annotated[Path, AfterValidator(_ndjson_file)], ...] = ()
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    patient: Mapping[str, Literal["gender", "age", "deceased"]] = {}
    observation: Mapping[str, Observation] = {}
    condition: Mapping[str, Codes | Condition] = {}

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """The columns from Conditions; codes alone are one too."""
        return {
            column: wanted if isinstance(wanted, Condition) else Condition(code=wanted)
            for column, wanted in self.condition.items()
        }

    @model_validator(mode="after")
    def _ages_have_a_date(self) -> "Fhir":
        if "age" in self.patient.values() and self.date is None:
            raise ValueError("an age needs the date at which it is computed")
        return self


class Manifest(Frozen):
    """Where the records lie and what their columns mean.

    Attributes:
        task: Name of the task that these records are for.
        file: One row per record: CSV (UTF-8, comma, one header row), Parquet or JSON lines; a query (``.sql``), whose
            result is the rows; Patients of a FHIR export (``.ndjson``); or all images in numpy's ``.npz``. Inside the
            manifest's folder.
        label: The file's label column, for a task with one choice; other tasks' label columns have names like any
            other, and ``columns`` translates them. Of an ``.npz`` file, as everywhere below, it is an array.
        validation_fraction: Share of the patients that is kept for validation, chosen by keyed hash of the id alone.
        columns: Schema name -> column of the file; a column that is left out has the schema's own name.
        categories: Schema name (or the label's) -> code in the file -> the schema's category.
        patient: Column that says which patient a row belongs to; a patient may have many rows.
        one_row_per_patient: Declares every row a patient of its own. With ``patient`` too, a repeated id is an error.
        missing_values: Texts that stand for "not known", besides an empty cell.
        incomplete_rows: What becomes of a row with a missing value, or a series without any: an error, or left out and
            counted.
        absent_classes: Classes that this hospital never sees; without this, their absence is an error. Of a task with
            several heads, as ``head: class``.
        groups: Name of a plan's subgroups -> column of the file, which no network sees; empty where this hospital does
            not record it. ``categories`` translates its codes.
        drop: Columns, DICOM tags and header fields that identify somebody, and are not to be used. Without this they
            are refused.
        out_of_range: What becomes of a value of a series outside the task's public range: an error, or taken for
            missing and counted.
        found_in_text: What becomes of a text in which something looks like an identifier: an error, or it is masked.
    """

    task: Name
    file: Annotated[Path, AfterValidator(_records_file)]
    label: Column | None = None
    validation_fraction: Annotated[float, Field(ge=0, le=0.9)]
    columns: Mapping[str, str] = {}
    categories: Mapping[str, Mapping[str, str]] = {}
    patient: Column | None = None
    one_row_per_patient: bool = False
    missing_values: tuple[str, ...] = ()
    incomplete_rows: Literal["refuse", "leave-out"] = "refuse"
    absent_classes: tuple[str, ...] = ()
    groups: Mapping[str, str] = {}
    drop: tuple[str, ...] = ()
    out_of_range: Literal["refuse", "leave-out"] = "refuse"
    found_in_text: Literal["refuse", "mask"] = "refuse"
    images: Pictures | None = None
    series: LongForm | None = None
    sql: Sql | None = None
    fhir: Fhir | None = None

    @model_validator(mode="after")
    def _patients_are_declared(self) -> "Manifest":
        if self.patient is None and not self.one_row_per_patient:
            raise ValueError('name the patient column (patient = "...") or declare one_row_per_patient = true')
        return self

    @model_validator(mode="after")
    def _sections_fit_the_file(self) -> "Manifest":
        for suffix, name, section in ((".sql", "sql", self.sql), (".ndjson", "fhir", self.fhir)):
            if (self.file.suffix == suffix) != (section is not None):
                raise ValueError(f"a file that ends in {suffix} and a section [{name}] need each other")
        return self

    @model_validator(mode="after")
    def _nothing_is_dropped_and_used(self) -> "Manifest":
        used = {self.label, self.patient, *self.columns.values(), *self.groups.values()} - {None}
        if both := [name for name in self.drop if name in used]:
            raise ValueError(f"drop: {', '.join(both)} is used by label, patient, [columns] or [groups]")
        return self

    def column(self, name: str) -> str:
        """The file's column for a name of the schema, or of a group."""
        return self.columns.get(name) or self.groups.get(name) or name

    def contents(self, task: Task) -> list[str]:
        """What a record holds besides columns, by the schema's names: the variables of a series, or the whole."""
        match task.input:
            case SeriesInput(variables=variables):
                return [variable.name for variable in variables] + ([] if self.series else [SIGNALS])
            case ImageInput():
                return [IMAGES]
            case TokensInput():
                return [TEXT]
            case TableInput():
                return []

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the manifest itself names, which hold records."""
        long_form = (self.series.file,) if self.series else ()
        return (self.file, *long_form, *(self.fhir.files if self.fhir else ()))


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


def check_fits(
    manifest: Manifest, task: Task, *, labelled: bool = True
) -> TableInput | ImageInput | SeriesInput | TokensInput:
    """Check the manifest's names against the task's schema, and return that schema.

    Args:
        manifest: As it was read.
        task: That the records are for.
        labelled: Whether it must name the label that the task has.

    Raises:
        RecordsError: Another task, a file or a section of another kind than the task's, or a name that the schema does
            not have.
    """
    where = manifest.file.parent / MANIFEST
    if manifest.task != task.name:
        raise RecordsError(
            f"{where} is for task {manifest.task}, not {task.name}", hint="Point the study at its own records."
        )
    _check_kind(manifest, task, where)
    if labelled:
        _check_label(manifest, task, where)
    names = schema_names(task)
    if both := [name for name in manifest.groups if name in names | set(task.label_columns)]:
        raise RecordsError(
            f"{where}: groups.{both[0]} is a column of {task.name} itself",
            hint="[groups] is for what no network sees; [columns] translates the task's own columns.",
        )
    coded = names | set(task.label_columns) | set(manifest.groups)
    unknown = [
        *(f"columns.{name}" for name in manifest.columns if name not in names | _own_labels(task)),
        *(f"categories.{name}" for name in manifest.categories if name not in coded),
        *(f"absent_classes: {name}" for name in manifest.absent_classes if name not in _class_names(task)),
        *(f"series.absent_variables: {name}" for name in _absent_variables(manifest) if name not in names),
    ]
    if unknown:
        raise RecordsError(f"{where}: not in the schema of {task.name}: {', '.join(unknown)}", hint=_HINT)
    return task.input


def schema_names(task: Task) -> set[str]:
    """Names of what a record is made of, which a manifest may translate to columns of its file."""
    match task.input:
        case TableInput(columns=columns):
            return {column.name for column in columns}
        case ImageInput():
            return {IMAGES}
        case SeriesInput(variables=variables):
            return {SIGNALS, *(variable.name for variable in variables)}
        case TokensInput():
            return {TEXT}


def _check_label(manifest: Manifest, task: Task, where: Path) -> None:
    """Refuse a manifest that names no label column where there must be one, or one where there are others."""
    if (manifest.label is None) == (task.choice is not None):
        names = ", ".join(task.label_columns)
        raise RecordsError(
            f"{where}: "
            + (f"names no label column for {names}" if task.choice else f"task {task.name} has no one label"),
            hint='Name the file\'s column: label = "..."'
            if task.choice
            else f"Leave label out; {names} are columns of the file, or translated by [columns].",
        )


def _class_names(task: Task) -> set[str]:
    if task.choice is not None:
        return set(task.choice.classes)
    return {f"{head.name}: {name}" for head in task.heads if isinstance(head, Choice) for name in head.classes}


def _own_labels(task: Task) -> set[str]:
    """Label columns that ``columns`` translates."""
    return set() if task.choice else set(task.label_columns)


def _absent_variables(manifest: Manifest) -> tuple[str, ...]:
    return manifest.series.absent_variables if manifest.series else ()


def _check_kind(manifest: Manifest, task: Task, where: Path) -> None:
    """Refuse a file or a section that is for another kind of input than the task's."""
    kind = task.input.kind
    if manifest.file.suffix == ".npz" and kind != "image":
        raise RecordsError(
            f"{where}: {manifest.file.name} is no file of the kind that task {task.name} reads",
            hint="Images may come in a .npz file; tables, series and text come in files with rows.",
        )
    sections = {"images": (manifest.images, "image"), "series": (manifest.series, "series")}
    for name, (section, wanted) in sections.items():
        if section is not None and kind != wanted:
            raise RecordsError(
                f"{where}: [{name}] is not for task {task.name}, whose inputs are of kind {kind}", hint=_HINT
            )
    if manifest.file.suffix == ".npz" and manifest.images is not None:
        raise RecordsError(f"{where}: [images] is for files of pictures, not for a .npz file", hint=_HINT)
