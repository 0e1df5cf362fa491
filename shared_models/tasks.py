"""A task: what is predicted, from which columns, with public ranges and categories and named units.

Normalisation uses the public ranges below, never a hospital's own means: private statistics would be one more release.
The loss is named here and computed in ``shared_models/nets/losses.py``, so that this file needs no torch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared_models.config import Frozen
from shared_models.errors import ConfigError


class Numeric(Frozen):
    """A measured column.

    Attributes:
        unit: As the values stand in the records, after any conversion by the hospital.
        low: Least value that is possible: physiology and instruments, never this hospital's extremes.
        high: Greatest value that is possible.
        scale: On which scale the range is divided evenly; quantities that grow by factors are ``log``, those that do so
            from zero ``sqrt``.
        within_step: What several values in one step of a series become. Of a sum, the range is that of the sum.
    """

    name: str
    unit: str
    low: float
    high: float
    scale: Literal["linear", "log", "sqrt"] = "linear"
    within_step: Literal["last", "mean", "sum"] = "last"
    description: str = ""

    @model_validator(mode="after")
    def _range_fits_the_scale(self) -> "Numeric":
        least = {"linear": -np.inf, "log": np.nextafter(0, 1), "sqrt": 0}[self.scale]
        if not least <= self.low < self.high:
            raise ValueError(f"{self.name}: low must be below high, and above zero on a log scale")
        return self

    def scaled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Encode values inside the public range to [-2, 2].

        Twice the customary width, so that *typical* values, which fill the middle of a range wide enough for the
        sickest patient, spread over about [-1, 1]. Private training needs that: a clipped gradient has one length to
        share between the columns and the constant input of the bias.

        Guarantees:
            * Uses public figures only; ``low`` maps to -2 and ``high`` to 2, and order is kept.
        """
        low, high = self._on_the_scale(np.array([self.low, self.high]))
        return 4 * (self._on_the_scale(values) - low) / (high - low) - 2

    def _on_the_scale(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.scale == "linear":
            return values
        return np.log(values) if self.scale == "log" else np.sqrt(values)


class Categorical(Frozen):
    """A column with public categories; the first is the reference and gets no indicator of its own."""

    name: str
    categories: tuple[str, ...]
    description: str = ""


class TableInput(Frozen):
    """Rows of columns. Encoded to float32 of shape ``(width,)``: numerics by ``scaled``, categories to indicators."""

    kind: Literal["table"] = "table"
    columns: tuple[Annotated[Numeric | Categorical, Field(union_mode="left_to_right")], ...]

    @property
    def width(self) -> int:
        """Length of one encoded row."""
        return sum(len(c.categories) - 1 if isinstance(c, Categorical) else 1 for c in self.columns)


class ImageInput(Frozen):
    """Images, float32 of shape ``(channels, height, width)`` scaled to [-1, 1] from the public range of the pixels."""

    kind: Literal["image"] = "image"
    channels: Literal[1, 3]
    height: Annotated[int, Field(ge=28, le=224)]
    width: Annotated[int, Field(ge=28, le=224)]


class SeriesInput(Frozen):
    """Series with missing values: float32 of shape ``(steps, 3 * variables)``: values, mask, time since last seen.

    Values are encoded by ``scaled``, and 0 where the mask is. Times are in steps, counted from the step before: 1 if a
    variable was seen there, one more for each step that it was not, and 0 in the first step.

    Attributes:
        step_unit: Length of a step: ``millisecond``, ``second``, ``minute``, ``hour`` or ``day``.
    """

    kind: Literal["series"] = "series"
    variables: tuple[Numeric, ...]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    step_unit: str


class TokensInput(Frozen):
    """Token ids, int64 of shape ``(length,)``; id 0 pads.

    Attributes:
        base: Whose tokenizer gives the ids: a pretrained base's, by digest. None: ``tokens.encode``.
    """

    kind: Literal["tokens"] = "tokens"
    vocabulary: Annotated[int, Field(ge=2, le=10_000_000)]
    length: Annotated[int, Field(ge=1, le=100_000)]
    base: str | None = None


class Task(Frozen):
    """Model input, label, loss and metrics, all public.

    Attributes:
        label: Name of the label column in a hospital's data.
        classes: What the label's values mean, in order; two for a binary task. The last of two is "positive".
        loss: ``binary-cross-entropy`` has one output logit, ``cross-entropy`` one per class.
    """

    name: str
    description: str
    input: Annotated[TableInput | ImageInput | SeriesInput | TokensInput, Field(discriminator="kind")]
    label: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    loss: Literal["binary-cross-entropy", "cross-entropy"]

    @property
    def outputs(self) -> int:
        """Number of logits the network must produce per record."""
        return 1 if self.loss == "binary-cross-entropy" else len(self.classes)


# Ten measures of cell nuclei; ranges of the mean, of the standard error and of the "worst" (mean of the three largest).
# These are the summary statistics that UCI publishes with the set, rounded outward to two digits.
_NUCLEI: tuple[tuple[str, str, tuple[float, float], tuple[float, float], tuple[float, float]], ...] = (
    ("radius", "pixel", (6.9, 29), (0.11, 2.9), (7.9, 37)),
    ("texture", "grey level", (9.7, 40), (0.36, 4.9), (12, 50)),
    ("perimeter", "pixel", (43, 190), (0.75, 22), (50, 260)),
    ("area", "pixel^2", (140, 2600), (6.8, 550), (180, 4300)),
    ("smoothness", "1", (0.052, 0.17), (0.0017, 0.032), (0.071, 0.23)),
    ("compactness", "1", (0.019, 0.35), (0.0022, 0.14), (0.027, 1.1)),
    ("concavity", "1", (0, 0.43), (0, 0.4), (0, 1.3)),
    ("concave_points", "1", (0, 0.21), (0, 0.053), (0, 0.3)),
    ("symmetry", "1", (0.1, 0.31), (0.0078, 0.079), (0.15, 0.67)),
    ("fractal_dimension", "1", (0.049, 0.098), (0.00089, 0.03), (0.055, 0.21)),
)

BREAST_CANCER = Task(
    name="breast-cancer",
    description="Malignant or benign, from the cell nuclei in a fine-needle aspirate of a breast mass.",
    input=TableInput(
        columns=tuple(
            Numeric(name=name, unit=unit, low=low, high=high, scale="log" if low > 0 else "sqrt")
            for kind in range(3)
            for measure, unit, *ranges in _NUCLEI
            for name in ((f"mean_{measure}", f"{measure}_error", f"worst_{measure}")[kind],)
            for low, high in (ranges[kind],)
        )
    ),
    label="diagnosis",
    classes=("benign", "malignant"),
    loss="binary-cross-entropy",
)

HEART_DISEASE = Task(
    name="heart-disease",
    description="Coronary artery disease (a diameter narrowed by more than half), from ten routine findings.",
    input=TableInput(
        columns=(
            Numeric(name="age", unit="year", low=18, high=100),
            Categorical(name="sex", categories=("female", "male")),
            Categorical(
                name="chest_pain",
                categories=("typical-angina", "atypical-angina", "non-anginal-pain", "asymptomatic"),
            ),
            Numeric(name="resting_blood_pressure", unit="mmHg", low=0, high=250, description="0: not measured"),
            Numeric(name="cholesterol", unit="mg/dl", low=0, high=650, description="serum; 0: not measured"),
            Categorical(name="fasting_blood_sugar", categories=("normal", "above-120-mg-dl")),
            Categorical(name="resting_ecg", categories=("normal", "st-t-abnormality", "left-ventricular-hypertrophy")),
            Numeric(name="maximum_heart_rate", unit="1/min", low=50, high=220),
            Categorical(name="exercise_angina", categories=("no", "yes")),
            Numeric(name="st_depression", unit="mm", low=-3, high=7, description="exercise against rest"),
        )
    ),
    label="disease",
    classes=("absent", "present"),
    loss="binary-cross-entropy",
)

PNEUMONIA = Task(
    name="pneumonia",
    description="Pneumonia or none, from a frontal chest X-ray of a child (as PneumoniaMNIST: Kermany et al. 2018).",
    input=ImageInput(channels=1, height=28, width=28),
    label="finding",
    classes=("normal", "pneumonia"),
    loss="binary-cross-entropy",
)

# Variables of the PhysioNet/CinC Challenge 2012, in its units. Ranges are what bedside monitors and laboratory
# analysers can report of a living adult, rounded outward: limits of instruments and of physiology, not of anybody's
# data.
_ICU: tuple[tuple[str, str, float, float, str, str], ...] = (
    ("albumin", "g/dL", 0.5, 7, "linear", "last"),
    ("alkaline_phosphatase", "IU/L", 5, 5000, "log", "last"),
    ("alanine_transaminase", "IU/L", 1, 30000, "log", "last"),
    ("aspartate_transaminase", "IU/L", 1, 40000, "log", "last"),
    ("bilirubin", "mg/dL", 0.05, 80, "log", "last"),
    ("blood_urea_nitrogen", "mg/dL", 1, 300, "log", "last"),
    ("cholesterol", "mg/dL", 20, 1000, "log", "last"),
    ("creatinine", "mg/dL", 0.05, 40, "log", "last"),
    ("diastolic_pressure_invasive", "mmHg", 10, 200, "linear", "last"),
    ("inspired_oxygen", "1", 0.2, 1, "linear", "last"),
    ("glasgow_coma_score", "1", 3, 15, "linear", "last"),
    ("glucose", "mg/dL", 10, 2000, "log", "last"),
    ("bicarbonate", "mmol/L", 2, 60, "linear", "last"),
    ("haematocrit", "%", 5, 75, "linear", "last"),
    ("heart_rate", "1/min", 10, 300, "linear", "last"),
    ("potassium", "mmol/L", 1, 15, "linear", "last"),
    ("lactate", "mmol/L", 0.1, 40, "log", "last"),
    ("mean_pressure_invasive", "mmHg", 10, 250, "linear", "last"),
    ("mechanical_ventilation", "1", 0, 1, "linear", "last"),
    ("magnesium", "mmol/L", 0.2, 10, "linear", "last"),
    ("diastolic_pressure", "mmHg", 10, 200, "linear", "last"),
    ("mean_pressure", "mmHg", 10, 250, "linear", "last"),
    ("systolic_pressure", "mmHg", 20, 300, "linear", "last"),
    ("sodium", "mmol/L", 90, 200, "linear", "last"),
    ("carbon_dioxide_pressure", "mmHg", 5, 200, "log", "last"),
    ("oxygen_pressure", "mmHg", 10, 700, "log", "last"),
    ("platelets", "1000/uL", 1, 2500, "sqrt", "last"),
    ("respiration_rate", "1/min", 0, 100, "linear", "last"),
    ("oxygen_saturation", "%", 20, 100, "linear", "last"),
    ("systolic_pressure_invasive", "mmHg", 20, 300, "linear", "last"),
    ("temperature", "degC", 25, 45, "linear", "last"),
    ("troponin_i", "ug/L", 0, 100, "sqrt", "last"),
    ("troponin_t", "ug/L", 0, 50, "sqrt", "last"),
    ("urine", "mL", 0, 12000, "sqrt", "sum"),
    ("white_cells", "1000/uL", 0, 500, "sqrt", "last"),
    ("weight", "kg", 20, 400, "log", "last"),
    ("ph", "1", 6.5, 8, "linear", "last"),
)

ICU_MORTALITY = Task(
    name="icu-mortality",
    description="Death in hospital, from the first 48 hours in intensive care (PhysioNet/CinC Challenge 2012).",
    input=SeriesInput(
        variables=tuple(
            Numeric.model_validate(
                dict(zip(("name", "unit", "low", "high", "scale", "within_step"), fields, strict=True))
            )
            for fields in _ICU
        ),
        steps=48,
        step_unit="hour",
    ),
    label="outcome",
    classes=("survived", "died"),
    loss="binary-cross-entropy",
)

NOTE_SPECIALTY = Task(
    name="note-specialty",
    description="The specialty that a transcribed clinical note belongs to (eight organ specialties of MTSamples).",
    input=TokensInput(vocabulary=8192, length=256),
    label="specialty",
    classes=(
        "cardiovascular-pulmonary",
        "orthopaedic",
        "gastroenterology",
        "obstetrics-gynaecology",
        "urology",
        "neurology",
        "ear-nose-throat",
        "ophthalmology",
    ),
    loss="cross-entropy",
)

TRIAL_IMAGES = Task(
    name="trial-images",
    description="Ten kinds of made-up pictures, for trials and benchmarks: without any clinical meaning.",
    input=ImageInput(channels=1, height=28, width=28),
    label="kind",
    classes=tuple(f"kind-{number}" for number in range(10)),
    loss="cross-entropy",
)

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (BREAST_CANCER, HEART_DISEASE, PNEUMONIA, ICU_MORTALITY, NOTE_SPECIALTY, TRIAL_IMAGES)}
)


def find_task(name: str) -> Task:
    """The installed task of that name.

    Raises:
        ConfigError: It is not installed here; the hint names those that are.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is not installed", hint=f"Installed tasks: {', '.join(sorted(TASKS))}.")
    return TASKS[name]
