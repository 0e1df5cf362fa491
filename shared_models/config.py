"""Configuration as frozen models: what a person writes in TOML is validated whole, and every error is said at once."""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from shared_models.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Frozen(BaseModel):
    """Immutable, and a typo in a key is an error: ``noise_multipler`` must not mean "default noise"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


LATER = "added after the format's first release"  # marks a field: ``Annotated[..., LATER]``


class Grown(Frozen):
    """A format that was given more fields since it was first released.

    Guarantees:
        * A field marked ``LATER`` is left out of whatever is dumped while it holds its default. So what uses no new
          field has the bytes and the digest that it always had, and is read by software that knows no such field.
        * What is left out comes back as the default when it is read: dumping and reading lose nothing.
    """

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        for name, field in type(self).model_fields.items():
            if LATER in field.metadata and getattr(self, name) == field.default:
                fields.pop(name, None)
        return fields


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    folder: Path = info.context["folder"] if info.context else Path()
    return folder / path


LocalPath = Annotated[Path, AfterValidator(_beside_the_file)]  # relative to the settings file that names it
Settings = TypeVar("Settings", bound=Frozen)


def read_settings(path: Path, model: type[Settings], *, described_in: str) -> Settings:
    """Read and validate a settings file, every error at once.

    Goes through JSON so that TOML's lists and texts fit the strict model's tuples and paths.

    Args:
        path: The TOML file; the model's ``LocalPath`` fields are relative to its folder.
        model: What it must hold.
        described_in: The document that explains every key.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or out of range.
    """
    fields = read_toml(path, "settings file")
    try:
        return model.model_validate_json(json.dumps(fields), context={"folder": path.absolute().parent})
    except (ValidationError, TypeError, ValueError) as error:
        text = explain(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path}: {text}", hint=f"See {described_in} for every key and its range.") from None


def explain(error: ValidationError) -> str:
    """All that is wrong with a file, on one line: every key with what it should be."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        text = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {text}")
    return "; ".join(problems)


def refuse_together(model: type[BaseModel], problems: Iterable[tuple[str, str]]) -> None:
    """Refuse values that are fine by themselves and do not fit each other: all at once, each under its own key.

    Args:
        model: Whose validator asks.
        problems: Key, dotted, and what is wrong with it.

    Raises:
        ValidationError: There is a problem; pydantic makes it part of the whole file's.
    """
    errors = [
        InitErrorDetails(
            type=PydanticCustomError("misfit", "{text}", {"text": text}), loc=tuple(key.split(".")), input=0
        )
        for key, text in problems
    ]
    if errors:
        raise ValidationError.from_exception_data(model.__name__, errors)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file that a person wrote.

    Raises:
        ConfigError: The file is missing, unreadable or not TOML; the message names it.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist", hint="Check the path, or write the file first.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{what} {path} cannot be read: {error}", hint="Mend the file; it must be UTF-8 TOML."
        ) from None
