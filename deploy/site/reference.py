"""Reference pages made from the code: every command with its options, every settings file with its keys."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import click
import typer

import auditor.cli
import client.cli
import server.cli
from client.records.manifest import Manifest
from client.settings import Settings as HospitalSettings
from server.settings import Settings as CoordinatorSettings
from shared_models.config import Frozen
from shared_models.plan import StudyPlan

COMMANDS = {
    "konsil-hospital": client.cli.app,
    "konsil-coordinator": server.cli.app,
    "konsil-audit": auditor.cli.app,
}
FILES: dict[str, tuple[type[Frozen], str]] = {
    "hospital.toml": (HospitalSettings, "hospital.md"),
    "coordinator.toml": (CoordinatorSettings, "coordinator.md"),
    "plan.toml": (StudyPlan, "plan.md"),
    "manifest.toml": (Manifest, "hospital.md"),
}


def pages() -> dict[str, str]:
    """Every reference page as Markdown, by its name in the site."""
    made = {f"reference/{name}": _commands_page(name, app) for name, app in COMMANDS.items()}
    for name, (model, document) in FILES.items():
        made[f"reference/{name.replace('.', '-')}"] = _file_page(name, model.model_json_schema(), document)
    return made


# commands


def _commands_page(name: str, app: typer.Typer) -> str:
    group = typer.main.get_command(app)
    head = f"# {name}\n\n{group.help}\n\nMade from the code: `{name} COMMAND --help` says the same."
    return "\n\n".join([head, *(_command(path, found) for path, found in commands((name,), group))]) + "\n"


def commands(path: tuple[str, ...], group: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with the words that call it."""
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands((*path, name), found)
        else:
            yield (*path, name), found


def _command(path: tuple[str, ...], command: Any) -> str:
    name, context = " ".join(path), click.Context(command)
    usage = " ".join((name, *command.collect_usage_pieces(context)))
    rows = [_parameter(parameter, context) for parameter in command.params]
    table = _table(("argument or option", "meaning", "default"), rows)
    return f"## {name}\n\n{_plain(command.help or '')}\n\n```text\n{usage}\n```\n\n{table}"


def _parameter(parameter: Any, context: click.Context) -> tuple[str, str, str]:
    is_option = parameter.param_type_name == "option"
    metavar = "" if getattr(parameter, "is_flag", False) else parameter.make_metavar(context)
    names = " / ".join((*parameter.opts, *parameter.secondary_opts))
    shown = f"{names} {metavar}".strip() if is_option else metavar
    default = "required" if parameter.required else _value(parameter.default or None)
    return f"`{shown}`", _plain(parameter.help or ""), default


# settings files


def _file_page(name: str, schema: dict[str, Any], document: str) -> str:
    head = f"# {name}\n\nMade from the code. What keys are for, with an example, is in [{document}](../{document})."
    return "\n\n".join([head, *_tables("", schema, schema["$defs"])]) + "\n"


def _tables(table: str, schema: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """A section for a table of the file, then those of the tables inside."""
    summary, meanings = _docstring(schema.get("description", ""))
    rows, inside = [], []
    for key, field in schema["properties"].items():
        references = list(dict.fromkeys(_references(field)))
        inside += [(f"{table}.{key}".strip("."), known[reference]) for reference in references]
        kind = "a table, below" if references else _kind(field)
        optional = "" if references else _value(field.get("default"))
        default = "required" if key in schema.get("required", ()) else optional
        rows.append((f"`{key}`", kind, default, _plain(meanings.get(key, ""))))
    name = schema["properties"].get("name", {}).get("const") or schema["properties"].get("rule", {}).get("const")
    heading = f"[{table}]" + (f" with {name}" if name else "") if table else "At the top"
    yield f"## {heading}\n\n{_plain(summary)}\n\n{_table(('key', 'range', 'default', 'meaning'), rows)}"
    for below, found in inside:
        yield from _tables(below, found, known)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Its first paragraph, and what it says of each attribute."""
    summary, _, attributes = text.partition("\n\nAttributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE)
    return summary.split("\n\n")[0], {name: meaning.strip() for name, meaning in found}


def _references(field: Any) -> Iterator[str]:
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for key, value in field.items():
            if key != "discriminator":
                yield from _references(value)
    elif isinstance(field, list):
        for value in field:
            yield from _references(value)


def _kind(field: dict[str, Any]) -> str:
    """What a key may be, in words."""
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(option) for option in options if option.get("type") != "null"))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list: {_kind(items)}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"table of: {_kind(values)}" if isinstance(values, dict) else "a table"
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    named = "path" if field.get("format") == "path" else kind.get(field.get("type", ""), "anything")
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {field[key]}" for key, sign in bounds if key in field]
    limits += [f"`{field['pattern']}`"] if "pattern" in field else []
    return " ".join((named, ", ".join(limits))).strip()


# Markdown


def _value(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is: reST's literals become code, and brackets no links."""
    text = re.sub(r"\s+", " ", text).strip().replace("``", "`")
    return re.sub(r"(?<!`)\[([\w-]+)\](?!`)", r"`[\1]`", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
