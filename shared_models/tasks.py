"""A task: what is predicted, from which columns, with public ranges and categories and named units.

What is predicted are *heads*: one of several classes, a quantity, the time to an event, an outline. Most tasks have
one. Several findings that a picture may show together are several heads of two classes each.

Normalisation uses the public ranges below, never a hospital's own means: private statistics would be one more release.
The loss is named here and computed in ``shared_models/nets/losses.py``, so that this file needs no torch.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared_models.config import Frozen
from shared_models.errors import ConfigError

if TYPE_CHECKING:
    from shared_models.plan import Augmentation, StudyPlan, Subgroups


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


class Choice(Frozen):
    """One of several classes.

    Attributes:
        name: Name of the label column.
        classes: What the label's values mean, in order. The last of two is "positive"; two have one logit together.
        weights: What a record's loss is multiplied with, by its class; None weighs all alike. From the plan.
    """

    kind: Literal["choice"] = "choice"
    name: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    weights: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _every_class_has_a_weight(self) -> "Choice":
        if self.weights is not None and len(self.weights) != len(self.classes):
            raise ValueError(f"{self.name} has {len(self.classes)} classes, and {len(self.weights)} weights")
        return self

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its label columns; a record's target has a number for each."""
        return (self.name,)


class Quantity(Frozen):
    """A number: regression, and forecasting where the inputs are of the past. Public range, as of any column.

    Attributes:
        measure: The label column: its range, and on which scale an error counts.
        loss: Of the encoded value, ``absolute`` (the network learns medians) or half its ``squared`` error (means).
    """

    kind: Literal["quantity"] = "quantity"
    measure: Numeric
    loss: Literal["absolute", "squared"] = "squared"

    @property
    def name(self) -> str:
        """Of the label column."""
        return self.measure.name

    @property
    def outputs(self) -> int:
        """One number, on the scale of ``Numeric.scaled``."""
        return 1

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its label columns."""
        return (self.measure.name,)


class Survival(Frozen):
    """Time to an event, in intervals with public edges: a hazard for each, given that nothing happened before.

    Its likelihood is a product over records, so that a patient's share of the gradient is the patient's alone, and
    clipping bounds it. Cox's partial likelihood is not: a patient stands in the risk set of every earlier event.

    Attributes:
        name: Of the event.
        time: Label column: time until the event, or until the record was last seen without it.
        event: Label column: ``yes`` where the event happened.
        unit: Of the times.
        edges: Where each interval ends, ascending; the first begins at 0. What happens later counts as seen no more.

    Source:
        Gensheimer and Narasimhan, "A scalable discrete-time survival model for neural networks", PeerJ 2019.
    """

    kind: Literal["survival"] = "survival"
    name: str
    time: str
    event: str
    unit: str
    edges: Annotated[tuple[float, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _edges_ascend(self) -> "Survival":
        if not all(before < after for before, after in pairwise((0.0, *self.edges))):
            raise ValueError(f"{self.name}: edges must ascend from above 0")
        return self

    @property
    def outputs(self) -> int:
        """Number of logits: one hazard an interval."""
        return len(self.edges)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its label columns; the target is ``intervals``."""
        return self.time, self.event

    def intervals(self, times: NDArray[np.float64], events: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Targets of records: how many intervals passed without the event, and whether it happened in the next.

        Who was last seen in an interval has passed it if more than half of it was over.

        Args:
            times: Shape ``(n,)``, not negative.
            events: Shape ``(n,)``.

        Returns:
            Shape ``(n, 2)``: intervals passed, from 0 to their number; 1 where the event happened in the next, else 0.
        """
        edges = np.array((0.0, *self.edges))
        middles = (edges[1:] + edges[:-1]) / 2
        happened = events & (times <= edges[-1])
        passed = np.where(
            happened,
            np.searchsorted(edges[1:], times, side="left"),  # an interval holds its end
            np.searchsorted(middles, times, side="left"),
        )
        return np.stack([passed, happened], axis=1).astype(np.float64)


class Outline(Frozen):
    """Which pixels of an image belong to something: segmentation. The only head of its task.

    Attributes:
        name: Name of the label column, which names the file of a record's mask.
    """

    kind: Literal["outline"] = "outline"
    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its label columns; the target is the mask, 1 where the pixel belongs to it, row by row."""
        return (self.name,)


Head = Annotated[Choice | Quantity | Survival | Outline, Field(discriminator="kind")]


class Task(Frozen):
    """Model input and what is predicted from it, all public.

    Attributes:
        heads: What is predicted; several share the network but its last layer, and their losses add up.
        groups: Columns beside the inputs, by which an evaluation tells patients apart; no network sees them. From the
            plan.
    """

    name: str
    description: str
    input: Annotated[TableInput | ImageInput | SeriesInput | TokensInput, Field(discriminator="kind")]
    heads: Annotated[tuple[Head, ...], Field(min_length=1)]
    groups: tuple[Annotated[Numeric | Categorical, Field(union_mode="left_to_right")], ...] = ()

    @model_validator(mode="after")
    def _heads_fit(self) -> "Task":
        if any(isinstance(head, Outline) for head in self.heads) and not (
            len(self.heads) == 1 and isinstance(self.input, ImageInput)
        ):
            raise ValueError("an outline is of an image, and the only head of its task")
        columns = self.label_columns
        if len(set(columns)) < len(columns):
            raise ValueError("two heads have a label column of the same name")
        return self

    @property
    def choice(self) -> Choice | None:
        """The head of a task that has one, if it is a choice."""
        head = self.heads[0]
        return head if len(self.heads) == 1 and isinstance(head, Choice) else None

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Names of all label columns, in the order of the heads."""
        return tuple(column for head in self.heads for column in head.columns)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Names of what the network sees, where it has names: columns of a table, variables of a series."""
        match self.input:
            case TableInput(columns=columns):
                return tuple(column.name for column in columns)
            case SeriesInput(variables=variables):
                return tuple(variable.name for variable in variables)
            case _:
                return ()

    @property
    def label(self) -> str:
        """Name of the label column of a task with one choice; see ``classes``."""
        return self._one_choice().name

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of a task with one choice.

        Raises:
            ConfigError: It is another kind of task.
        """
        return self._one_choice().classes

    @property
    def outputs(self) -> int:
        """Numbers that the network must give for each record: logits, or encoded quantities."""
        return sum(widths[0] for widths in self.widths)

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Of each head: how many of the network's outputs are its own, and how many numbers its target has."""
        if isinstance(self.input, ImageInput) and isinstance(self.heads[0], Outline):
            return ((self.input.height * self.input.width,) * 2,)
        return tuple((head.outputs, len(head.columns)) for head in self.heads if not isinstance(head, Outline))

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one record's target: a class index for a task with one choice, else all heads' numbers."""
        return () if self.choice else (sum(widths[1] for widths in self.widths),)

    def _one_choice(self) -> Choice:
        if self.choice is None:
            raise ConfigError(
                f"task {self.name} is more than one choice between classes", hint="This is for tasks with classes only."
            )
        return self.choice


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
    heads=(Choice(name="diagnosis", classes=("benign", "malignant")),),
)

_HEART: tuple[Numeric | Categorical, ...] = (
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

HEART_DISEASE = Task(
    name="heart-disease",
    description="Coronary artery disease (a diameter narrowed by more than half), from ten routine findings.",
    input=TableInput(columns=_HEART),
    heads=(Choice(name="disease", classes=("absent", "present")),),
)

# As above where cholesterol is often not measured: what a zero would have said is a finding of its own.
CORONARY_DISEASE = Task(
    name="coronary-disease",
    description="Coronary artery disease (a diameter narrowed by more than half), from ten findings; "
    "cholesterol may be missing.",
    input=TableInput(
        columns=(
            *(
                column.model_copy(update={"description": "serum; write 240 where it was not measured"})
                if column.name == "cholesterol"
                else column
                for column in _HEART
            ),
            Categorical(name="cholesterol_measured", categories=("yes", "no")),
        )
    ),
    heads=(Choice(name="disease", classes=("absent", "present")),),
)

PNEUMONIA = Task(
    name="pneumonia",
    description="Pneumonia or none, from a frontal chest X-ray of a child (as PneumoniaMNIST: Kermany et al. 2018).",
    input=ImageInput(channels=1, height=28, width=28),
    heads=(Choice(name="finding", classes=("normal", "pneumonia")),),
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
    ("age", "year", 15, 120, "linear", "last"),  # at admission: seen in the first hour, as the challenge files it
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
    heads=(Choice(name="outcome", classes=("survived", "died")),),
)

NOTE_SPECIALTY = Task(
    name="note-specialty",
    description="The specialty that a transcribed clinical note belongs to (eight organ specialties of MTSamples).",
    input=TokensInput(vocabulary=8192, length=256),
    heads=(
        Choice(
            name="specialty",
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
        ),
    ),
)

# Indicators of TCGA's clinical tables, in the selection of FLamby (Ogier du Terrail et al., arXiv:2210.04620).
_TUMOUR: tuple[str, ...] = (
    "ethnicity_not_hispanic",
    "ethnicity_not_reported",
    "race_asian",
    "race_black",
    "race_not_reported",
    "race_white",
    "metastasis_mx",
    "nodes_n0_i_minus",
    "nodes_n1",
    "nodes_n1a",
    "nodes_n2",
    "nodes_n2a",
    "pathologic_stage_ia",
    "pathologic_stage_iia",
    "pathologic_stage_iib",
    "pathologic_stage_iiia",
    "pathologic_stage_iiic",
    "tumour_t1c",
    "tumour_t2",
    "tumour_t3",
    "staging_edition_5",
    "staging_edition_6",
    "staging_edition_7",
    "icd_c50_9",
    "morphology_8500_3",
    "morphology_8520_3",
    "infiltrating_duct_carcinoma",
    "lobular_carcinoma",
    "prior_malignancy",
    "synchronous_malignancy_not_reported",
    "therapy_not_reported",
    "therapy",
    "stage_i",
    "stage_ia",
    "stage_iia",
    "stage_iib",
    "stage_iiia",
    "stage_iiic",
)

BREAST_CANCER_SURVIVAL = Task(
    name="breast-cancer-survival",
    description="Death after the diagnosis of breast cancer, within ten years, from age, stage and treatment.",
    input=TableInput(
        columns=(
            Numeric(name="age", unit="year", low=18, high=100),
            *(Categorical(name=name, categories=("no", "yes")) for name in _TUMOUR),
        )
    ),
    heads=(
        Survival(
            name="death", time="days", event="died", unit="day", edges=tuple(365.25 * year for year in range(1, 11))
        ),
    ),
)

LUNG_SURVIVAL = Task(
    name="lung-survival",
    description="Death with advanced lung cancer, within two and a half years, from age, sex, performance and "
    "nutrition (as NCCTG's trial: Loprinzi et al. 1994).",
    input=TableInput(
        columns=(
            Numeric(name="age", unit="year", low=18, high=100),
            Categorical(name="sex", categories=("female", "male")),
            Numeric(name="ecog", unit="1", low=0, high=4, description="performance, by the physician; 0 is best"),
            Numeric(name="karnofsky_physician", unit="%", low=0, high=100),
            Numeric(name="karnofsky_patient", unit="%", low=0, high=100),
            Numeric(name="meal_calories", unit="kcal", low=0, high=5000),
            Numeric(name="weight_loss", unit="pound", low=-100, high=100, description="in six months"),
        )
    ),
    heads=(
        Survival(
            name="death",
            time="days",
            event="died",
            unit="day",
            edges=(90.0, 180.0, 270.0, 360.0, 450.0, 540.0, 720.0, 900.0),
        ),
    ),
)

CHEST_FINDINGS = Task(
    name="chest-findings",
    description="Fourteen findings that a frontal chest X-ray may show together (as ChestMNIST: Wang et al. 2017).",
    input=ImageInput(channels=1, height=28, width=28),
    heads=tuple(
        Choice(name=name, classes=("absent", "present"))
        for name in (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "oedema",
            "emphysema",
            "fibrosis",
            "pleural_thickening",
            "hernia",
        )
    ),
)

ICU_OUTCOMES = Task(
    name="icu-outcomes",
    description="Death in hospital and length of stay, from the first 48 hours in intensive care.",
    input=ICU_MORTALITY.input,
    heads=(
        *ICU_MORTALITY.heads,
        Quantity(measure=Numeric(name="length_of_stay", unit="day", low=0.1, high=365, scale="log")),
    ),
)

LUNG_OUTLINE = Task(
    name="lung-outline",
    description="Which pixels of a frontal chest X-ray are lung.",
    input=ImageInput(channels=1, height=64, width=64),
    heads=(Outline(name="lungs"),),
)

ATTENDANCES = Task(
    name="attendances",
    description="Emergency attendances of the next month, from the last twelve; a row is a month, no patient.",
    input=TableInput(
        columns=tuple(
            Numeric(
                name=f"months_ago_{ago}",
                unit="1",
                low=0.25,
                high=4,
                scale="log",
                description="attendances a day in that month, over their mean in the twelve months",
            )
            for ago in range(1, 13)
        )
    ),
    heads=(Quantity(measure=Numeric(name="next_month", unit="1", low=0.25, high=4, scale="log")),),
)

TRIAL_IMAGES = Task(
    name="trial-images",
    description="Ten kinds of made-up pictures, for trials and benchmarks: without any clinical meaning.",
    input=ImageInput(channels=1, height=28, width=28),
    heads=(Choice(name="kind", classes=tuple(f"kind-{number}" for number in range(10))),),
)

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            BREAST_CANCER,
            HEART_DISEASE,
            CORONARY_DISEASE,
            BREAST_CANCER_SURVIVAL,
            LUNG_SURVIVAL,
            PNEUMONIA,
            CHEST_FINDINGS,
            LUNG_OUTLINE,
            ICU_MORTALITY,
            ICU_OUTCOMES,
            NOTE_SPECIALTY,
            ATTENDANCES,
            TRIAL_IMAGES,
        )
    }
)


def task_of(plan: "StudyPlan") -> Task:
    """The plan's task: inputs as its network takes them, the class weights that the plan gives, its groups.

    A pretrained encoder has tokens of its own: with it, a task on texts is the same task in these.

    Raises:
        ConfigError: The task is not installed here, has no such classes, or inputs that cannot be changed so.
        PretrainedError: The base that the network starts from is not here.
    """
    task = _in_tokens_of(plan, find_task(plan.task))
    if plan.evaluation is not None:
        task = with_groups(task, plan.evaluation.subgroups)
    if plan.training.augmentation is not None:
        _check_augmentation(task, plan.training.augmentation)
    weights = plan.training.class_weights
    choices = {head.name: len(head.classes) for head in task.heads if isinstance(head, Choice)}
    for name, given in weights.items():
        if choices.get(name) != len(given):
            raise ConfigError(
                f"training.class_weights: task {task.name} has no label {name!r} of {len(given)} classes",
                hint="A weight for each class, by label: "
                + (
                    ", ".join(f"{label} ({classes})" for label, classes in choices.items())
                    or "it has none with classes"
                )
                + ".",
            )
    heads = (
        head.model_copy(update={"weights": weights[head.name]}) if head.name in weights else head for head in task.heads
    )
    return task.model_copy(update={"heads": tuple(heads)}) if weights else task


def with_groups(task: Task, subgroups: "Sequence[Subgroups]") -> Task:
    """The task with the columns that subgroups declare beside its inputs.

    Raises:
        ConfigError: Such a column has the name of an input or of a label.
    """
    declared = [one for one in subgroups if one.beside]
    if taken := [one.column for one in declared if one.column in {*task.input_columns, *task.label_columns}]:
        raise ConfigError(
            f"subgroups by {taken[0]}: task {task.name} has a column of that name",
            hint="Leave categories, low, high and unit out if it is a column of the task's table; "
            "else choose another name.",
        )
    groups = (
        Categorical(name=one.column, categories=one.categories)
        if one.low is None or one.high is None
        else Numeric(name=one.column, unit=one.unit, low=one.low, high=one.high)
        for one in declared
    )
    return task.model_copy(update={"groups": tuple(groups)})


def _in_tokens_of(plan: "StudyPlan", task: Task) -> Task:
    network = plan.network
    if network.name != "pretrained-encoder" or not isinstance(task.input, TokensInput):
        return task
    from shared_models.pretrained import find_encoder  # noqa: PLC0415 - needs torch, which this file does not

    vocabulary = find_encoder(network.base).shape["vocab_size"]
    tokens = TokensInput(vocabulary=vocabulary, length=network.length, base=network.base)
    return task.model_copy(update={"input": tokens})


def _check_augmentation(task: Task, augmentation: "Augmentation") -> None:
    """Refuse what the task's inputs, or what is predicted from them, cannot take."""
    moves = {
        "shift": augmentation.shift,
        "rotate_degrees": augmentation.rotate_degrees,
        "flip": augmentation.flip,
    }
    match task.input:
        case ImageInput():
            # A mask would have to move with its image.
            refused = {"drop": augmentation.drop} | (moves if isinstance(task.heads[0], Outline) else {})
        case SeriesInput():
            refused = moves
        case _:
            refused = {"copies": True}
    if wrong := [name for name, value in refused.items() if value]:
        raise ConfigError(
            f"training.augmentation: {', '.join(wrong)} is not for task {task.name}",
            hint="Images take shift, rotate_degrees, flip, contrast and noise, those with outlines the last two; "
            "series take contrast, noise and drop; tables and texts are trained on as they are.",
        )


def find_task(name: str) -> Task:
    """The installed task of that name.

    Raises:
        ConfigError: It is not installed here; the hint names those that are.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is not installed", hint=f"Installed tasks: {', '.join(sorted(TASKS))}.")
    return TASKS[name]
