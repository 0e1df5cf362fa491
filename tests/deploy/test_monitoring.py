"""Alert rules and dashboard: only what the coordinator exports, and each alert when it should and not before."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import CertificateMetrics, _Families
from server.store import State
from tests.deploy.tools import DEPLOY, said, tool

MONITORING = DEPLOY / "monitoring"
PROMTOOL = "Debian: apt install prometheus"
ELSEWHERE = {"up": {"job"}}
SUFFIXES = {"gauge": [""], "counter": ["_total"], "summary": ["_count", "_sum"]}


def exported() -> dict[str, set[str]]:
    """Names of the series that the coordinator's page has, and the labels of each."""
    return ELSEWHERE | {
        f"{family.name}{suffix}": set(family._labelnames)  # type: ignore[attr-defined]
        for family in [*_Families().all(), *CertificateMetrics(list).collect()]
        for suffix in SUFFIXES[family.type]
    }


def rules() -> list[dict[str, Any]]:
    """The alert rules."""
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    found = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def drawn() -> list[str]:
    """Every expression of the dashboard."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


EXPRESSIONS = [*(rule["expr"] for rule in rules()), *drawn()]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_use_series_and_labels_that_exist(expression: str) -> None:
    """A rule over a name that nobody exports never fires, and nobody notices."""
    known = exported()

    names = re.findall(r"\b(up|konsil_\w+)(?:\{(.*?)\})?", expression)
    grouped = re.findall(r"\b(?:by|on) \((.*?)\)", expression)

    assert names
    assert [name for name, _ in names if name not in known] == []
    labels = {name: set(re.findall(r"(\w+)=", matchers)) for name, matchers in names}
    assert {name: found - known[name] for name, found in labels.items() if found - known[name]} == {}
    said_by = {label for group in grouped for label in group.split(", ")}
    assert said_by <= set.union(*(known[name] for name, _ in names))
    assert set(re.findall(r'state="(\w+)"', expression)) <= {state.value for state in State}


def test_each_metric_is_watched_or_drawn() -> None:
    """What is exported and shown nowhere is either missing here, or need not be exported."""
    used = set(re.findall(r"konsil_\w+", " ".join(EXPRESSIONS)))
    unused = {name for name in exported() if name not in used and name != "up"}

    assert unused == {"konsil_study_queue_position", "konsil_rounds_answered_total"}


def test_every_alert_is_tested_and_every_text_says_what_happened() -> None:
    """An alert without a test has never been seen to fire."""
    tests = yaml.safe_load((MONITORING / "alerts.test.yml").read_text(encoding="utf-8"))["tests"]

    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}

    assert fired == {rule["alert"] for rule in rules()}
    assert {rule["labels"]["severity"] for rule in rules()} == {"warning", "critical"}
    assert all(set(rule["annotations"]) == {"summary", "description"} for rule in rules())


def test_the_document_says_what_to_do_about_every_alert() -> None:
    """Whoever is woken by an alert looks it up."""
    document = (DEPLOY.parent / "docs" / "deploy.md").read_text(encoding="utf-8")

    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in document] == []


def test_promtool_accepts_the_rules() -> None:
    """Prometheus's own check."""
    promtool = tool("promtool", where=PROMTOOL)

    assert f"{len(rules())} rules found" in said(promtool, "check", "rules", MONITORING / "alerts.yml")


def test_alerts_fire_when_they_should_and_not_before() -> None:
    """Prometheus's own unit tests, over series that grow minute by minute."""
    promtool = tool("promtool", where=PROMTOOL)

    assert "SUCCESS" in said(promtool, "test", "rules", "alerts.test.yml", cwd=MONITORING)


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    """With the files beside it that it names."""
    promtool = tool("promtool", where=PROMTOOL)
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_bytes((MONITORING / name).read_bytes())
    for name in ("ca.pem", "viewers.token"):
        (tmp_path / name).touch()

    assert "SUCCESS" in said(promtool, "check", "config", tmp_path / "prometheus.yml")


def test_promtool_parses_what_the_dashboard_draws(tmp_path: Path) -> None:
    """As rules that would record it, with Grafana's variable replaced by what it stands for."""
    promtool = tool("promtool", where=PROMTOOL)
    recorded = [
        {"record": f"drawn:{number}", "expr": expression.replace("$study", ".*")}
        for number, expression in enumerate(drawn())
    ]
    path = tmp_path / "drawn.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "drawn", "rules": recorded}]}), encoding="utf-8")

    assert f"{len(recorded)} rules found" in said(promtool, "check", "rules", path)


def test_panels_have_names_and_room() -> None:
    """Every panel has an id of its own, a title and a data source that can be chosen, and none lies on another."""
    panels = dashboard()["panels"]

    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
