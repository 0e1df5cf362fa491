"""The Helm chart: rendered by Helm, valid for Kubernetes; its settings are read by the coordinator's own model."""

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.page import OPEN
from server.settings import Settings, read_settings
from tests.deploy.tools import DEPLOY, ROOT, said, tool

CHART = DEPLOY / "helm" / "konsil-coordinator"
EXAMPLE = CHART / "ci" / "example-values.yaml"
HELM = "https://helm.sh; it is in no Debian package"
KUBERNETES = ("1.27.0", "1.37.0")  # the oldest that Chart.yaml names, and the newest that was looked at


@cache
def rendered(*options: str) -> tuple[dict[str, Any], ...]:
    """The manifests of the example installation."""
    text = said(tool("helm", where=HELM), "template", "centre", CHART, "--values", EXAMPLE, *options)
    return tuple(yaml.safe_load_all(text))


def the(kind: str, *options: str) -> dict[str, Any]:
    """The one manifest of this kind."""
    (found,) = (manifest for manifest in rendered(*options) if manifest["kind"] == kind)
    return found


def schema() -> dict[str, Any]:
    """Of the values."""
    found = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def values(path: Path) -> dict[str, Any]:
    """A file of values."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


# what holds without any tool


def test_every_value_has_a_place_in_the_schema_and_every_place_a_value() -> None:
    """A value that the schema does not know is refused, so a typo cannot mean the default."""

    def keys(found: dict[str, Any], at: str = "") -> Iterator[str]:
        for key, value in found.items():
            place = f"{at}.{key}" if at else key
            inside = schema_at(place)
            if isinstance(value, dict) and "properties" in inside:
                assert inside["additionalProperties"] is False, place
                yield from keys(value, place)
            yield place

    def schema_at(place: str) -> dict[str, Any]:
        found = whole
        for key in place.split("."):
            found = found["properties"][key]
            if "$ref" in found:
                found = whole["$defs"][found["$ref"].rpartition("/")[2]]
        return found

    whole = schema()

    assert set(whole["properties"]) - {"global"} == set(values(CHART / "values.yaml"))
    assert len(list(keys(values(CHART / "values.yaml")))) > 30


def test_the_defaults_alone_are_refused_and_the_example_is_not() -> None:
    """What has no honest default has to be said: roster, certificate, database, token."""
    validator = jsonschema.Draft202012Validator(schema())
    defaults = values(CHART / "values.yaml")
    merged = {key: {**value, **values(EXAMPLE).get(key, {})} if isinstance(value, dict) else value
              for key, value in defaults.items()}  # fmt: skip

    missing = {".".join(map(str, error.absolute_path)) for error in validator.iter_errors(defaults)}

    assert missing == {"consortium.configMap", "tls.secret", "database.url", "database.passwordSecret",
                       "page.tokenSecret"}  # fmt: skip
    assert list(validator.iter_errors(merged)) == []


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://konsil:secret@db/konsil",
        "sqlite:///state/coordinator.sqlite",
        "postgresql+psycopg://konsil@db",
        "",
    ],
)
def test_a_url_with_a_password_or_without_a_server_is_refused(url: str) -> None:
    """Values end in a ConfigMap, in Helm's history and in shells' histories: no place for a password."""
    url_schema = jsonschema.Draft202012Validator(schema()["properties"]["database"]["properties"]["url"])

    assert not url_schema.is_valid(url)
    assert url_schema.is_valid(values(EXAMPLE)["database"]["url"])


def test_every_key_of_the_settings_template_is_a_key_of_the_settings() -> None:
    """Also where Helm is not installed; where it is, the rendered file is read by the model itself."""
    template = (CHART / "templates" / "settings.yaml").read_text(encoding="utf-8").split("coordinator.toml: |\n")[1]
    known = {"": set(Settings.model_fields)} | {
        table: set(next(kind for kind in _kinds(table)).model_fields) for table in ("tls", "control", "page")
    }

    table, found = "", []
    for line in map(str.strip, template.splitlines()):
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            table = heading[1]
        elif key := re.match(r"(\w+) = ", line):
            found.append((table, key[1]))

    assert len(found) > 12
    assert [(table, key) for table, key in found if key not in known[table]] == []


def _kinds(table: str) -> Iterator[Any]:
    annotation: Any = Settings.model_fields[table].annotation
    yield from (kind for kind in (annotation, *getattr(annotation, "__args__", ())) if hasattr(kind, "model_fields"))


def test_the_chart_is_of_the_projects_version_and_its_values_are_documented() -> None:
    """A chart of another release would render settings that the image does not know."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = values(CHART / "Chart.yaml")
    document = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    plain = {"terminationGracePeriodSeconds", "nodeSelector", "tolerations", "affinity"}  # Kubernetes' own words

    assert chart["version"] == chart["appVersion"] == project["version"]
    assert [key for key in values(CHART / "values.yaml") if key not in plain and f"`{key}" not in document] == []


# what Helm renders


def test_helm_lint_has_nothing_to_say() -> None:
    """With the example's values; strict, so that a warning counts."""
    text = said(tool("helm", where=HELM), "lint", "--strict", CHART, "--values", EXAMPLE)

    assert re.findall(r"\[(?:WARNING|ERROR)\].*", text) == []


def test_helm_refuses_an_installation_without_its_secrets() -> None:
    """By the schema of the values, before anything reaches a cluster."""
    text = said(tool("helm", where=HELM), "template", "centre", CHART, status=1)

    assert "database/url" in text
    assert "tls/secret" in text


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid_for_kubernetes(version: str) -> None:
    """Against the cluster's own schemas, unknown fields refused."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

    for manifest in rendered():
        validate.validate(manifest, version, strict=True)

    kinds = sorted(manifest["kind"] for manifest in rendered())
    assert kinds == ["ConfigMap", "NetworkPolicy", "Service", "Service", "Service", "StatefulSet"]


def settings(folder: Path) -> Settings:
    """The rendered coordinator.toml, as the coordinator reads it."""
    path = folder / "coordinator.toml"
    path.write_text(the("ConfigMap")["data"]["coordinator.toml"], encoding="utf-8")
    return read_settings(path)


def test_the_coordinator_reads_its_settings(tmp_path: Path) -> None:
    """By its own model, which refuses unknown keys; limits of the control service arrive."""
    found = settings(tmp_path)

    assert found.database_url == values(EXAMPLE)["database"]["url"]
    assert (found.control.maximum_connections, found.control.keepalive_s) == (1000, 15.5)
    assert found.log_format == "json"


def test_ports_of_services_pod_and_settings_agree(tmp_path: Path) -> None:
    """Each service leads to the port on which the coordinator listens for it, on every address."""
    found = settings(tmp_path)
    assert found.page is not None
    listening = {"hospitals": found.port, "control": found.control.port, "page": found.page.port}
    (container,) = the("StatefulSet")["spec"]["template"]["spec"]["containers"]
    services = {m["metadata"]["name"]: m["spec"] for m in rendered() if m["kind"] == "Service"}

    assert {port["name"]: port["containerPort"] for port in container["ports"]} == listening
    assert {port["targetPort"]: port["port"] for s in services.values() for port in s["ports"]} == listening
    assert {found.host, found.control.host, found.page.host} == {"0.0.0.0"}  # noqa: S104 - inside of a pod
    assert {name: spec["type"] for name, spec in services.items()} == {
        "centre-hospitals": "LoadBalancer",
        "centre-control": "ClusterIP",
        "centre-page": "ClusterIP",
    }


def test_probes_ask_what_the_coordinator_serves() -> None:
    """Health over TLS, from a path that needs no token. A database that is away restarts nothing."""
    (container,) = the("StatefulSet")["spec"]["template"]["spec"]["containers"]

    health = container["readinessProbe"]["httpGet"]

    assert health == container["startupProbe"]["httpGet"] == {"scheme": "HTTPS", "port": "page", "path": "/healthz"}
    assert health["path"] in OPEN
    assert container["livenessProbe"]["tcpSocket"] == {"port": "hospitals"}


def test_the_pod_is_confined() -> None:
    """As the restricted Pod Security Standard has it, and a root file system that cannot be written."""
    pod = the("StatefulSet")["spec"]["template"]["spec"]

    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*pod["containers"], *pod["initContainers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["image"].partition("@")[2].startswith("sha256:")


def test_secrets_come_by_reference_and_are_the_owners_alone(tmp_path: Path) -> None:
    """No manifest holds one. Each file that the settings name is copied 0600 into memory from a secret."""
    found = settings(tmp_path)
    assert found.page is not None
    pod = the("StatefulSet")["spec"]["template"]["spec"]
    (copier,) = pod["initContainers"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}

    copied = {f"/run/konsil/{Path(path).name}" for path in copier["args"]}
    given = {item["path"] for source in volumes["given"]["projected"]["sources"] for item in source["secret"]["items"]}

    assert copier["command"][:3] == ["install", "--mode", "0600"]
    assert {Path(path).name for path in copier["args"]} == given
    assert {str(path) for path in (*_tls(found), found.page.token_file)} | {container["env"][0]["value"]} == copied
    assert volumes["secrets"]["emptyDir"]["medium"] == "Memory"
    assert [manifest["kind"] for manifest in rendered() if manifest["kind"] == "Secret"] == []
    assert "password" not in json.dumps(rendered()).lower().replace("passwordsecret", "")


def _tls(found: Settings) -> tuple[Path, Path, Path]:
    assert found.tls.authority_key is None, "the authority's key has no place in a cluster"
    return found.tls.ca, found.tls.certificate, found.tls.key


def test_the_network_policy_lets_in_whom_the_values_name_and_nobody_else() -> None:
    """An empty list of peers is no rule: in Kubernetes a rule without peers would be open to everybody."""
    policy = the("NetworkPolicy")["spec"]
    closed = the("NetworkPolicy", "--set-json", 'networkPolicy={"control":[],"page":[],"database":[]}')["spec"]

    assert {rule["ports"][0]["port"] for rule in policy["ingress"]} == {"hospitals", "control", "page"}
    assert all(rule["from"] for rule in policy["ingress"])
    assert all(rule["to"] for rule in policy["egress"])
    assert sorted({port["port"] for rule in policy["egress"] for port in rule["ports"]}) == [53, 5432]
    assert {rule["ports"][0]["port"] for rule in closed["ingress"]} == {"hospitals"}
    assert {port["port"] for rule in closed["egress"] for port in rule["ports"]} == {53}
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_there_is_one_coordinator_and_its_roster_can_change_under_it() -> None:
    """Two would use numbers of attempts twice. A volume by subPath would never see a roster that was signed later."""
    (container,) = the("StatefulSet")["spec"]["template"]["spec"]["containers"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}

    assert the("StatefulSet")["spec"]["replicas"] == 1
    assert "subPath" not in mounts["consortium"]
