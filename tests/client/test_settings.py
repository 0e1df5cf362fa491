"""A hospital's settings: what is read, and what is refused with which words."""

from pathlib import Path

import pytest

from client.settings import Settings, read_settings
from shared_models.errors import ConfigError

SETTINGS = """
name = "north"
coordinator = "coordinator.example:9092"
records = "records"
state = "/var/lib/konsil"
roster = "roster.json"

[tls]
ca = "keys/ca.pem"
certificate = "keys/tls.pem"
key = "keys/tls.key"

[keys]
identity = "keys/identity.key"
node = "keys/node.key"
root = "root.pub"

[population]
name = "all-patients"
public_size = 200
epsilon = 2.0
delta = 1e-4
order = 14

[policy]
tasks = ["breast-cancer"]
networks = ["logistic-regression", "mlp"]
minimum_noise_multiplier = 1.0
maximum_epsilon_per_study = 1.0
minimum_hospitals = 3
maximum_attempts = 10
maximum_rounds = 100
hours = ["mon-fri 20:00-06:00"]
"""


def read(folder: Path, text: str) -> Settings:
    """Write a settings file and read it."""
    path = folder / "hospital.toml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path)


def test_paths_are_relative_to_the_settings_file(tmp_path: Path) -> None:
    """The folder can be moved as one; a path that is absolute stays what it is."""
    settings = read(tmp_path, SETTINGS)

    assert settings.records == tmp_path / "records"
    assert settings.tls.ca == tmp_path / "keys" / "ca.pem"
    assert settings.keys.identity == tmp_path / "keys" / "identity.key"
    assert settings.state == Path("/var/lib/konsil")


def test_what_may_be_left_out_is_what_has_an_honest_default(tmp_path: Path) -> None:
    """Device, threads and the release of statistics have one; a budget and a policy have none."""
    settings = read(tmp_path, SETTINGS)

    assert (settings.device, settings.threads, settings.policy.release_validation) == ("auto", 1, False)
    for table in ("tls", "keys", "population", "policy"):
        with pytest.raises(ConfigError, match=f"{table}: Field required"):
            read(tmp_path, SETTINGS.replace(f"[{table}]", f"[other-{table}]"))


def test_every_error_is_named_at_once(tmp_path: Path) -> None:
    """A person mends a file once, not once per error."""
    text = SETTINGS.replace("epsilon = 2.0", "epsilon = 0.0").replace("order = 14", "order = 1")

    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text.replace("minimum_hospitals", "minimum_hopsitals"))

    for clause in ("population.epsilon", "population.order", "policy.minimum_hopsitals: unknown key"):
        assert clause in str(caught.value)


def test_delta_is_at_most_a_tenth_of_one_over_the_public_size(tmp_path: Path) -> None:
    """The refusal shows both numbers; the limit itself is allowed."""
    assert read(tmp_path, SETTINGS.replace("delta = 1e-4", "delta = 0.0005")).population.delta == 0.0005

    with pytest.raises(ConfigError, match=r"delta 0.00051 is above 1 / \(10 \* public_size\) = 0.0005 .* size of 200"):
        read(tmp_path, SETTINGS.replace("delta = 1e-4", "delta = 0.00051"))


@pytest.mark.parametrize("figure", ["nan", "inf", "-1.0", "0.0"])
@pytest.mark.parametrize(("key", "value"), [("epsilon", "2.0"), ("delta", "1e-4"), ("minimum_noise_multiplier", "1.0")])
def test_a_figure_that_is_none_is_refused(tmp_path: Path, key: str, value: str, figure: str) -> None:
    """NaN and infinity pass no comparison, and zero is no amount of privacy."""
    with pytest.raises(ConfigError, match=key):
        read(tmp_path, SETTINGS.replace(f"{key} = {value}", f"{key} = {figure}"))


@pytest.mark.parametrize(
    "address",
    [
        "coordinator.example",
        "https://c.example:1",
        "c.example:0",
        "c.example:65536",
        "c:x",
        ":9092",
        "::1:9092",
        "a b:1",
    ],
)
def test_an_address_is_host_and_port(tmp_path: Path, address: str) -> None:
    """What could not be called is refused when the settings are read, not when the daemon starts to retry."""
    with pytest.raises(ConfigError, match="coordinator"):
        read(tmp_path, SETTINGS.replace("coordinator.example:9092", address))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:65535", "coordinator:9092"])
def test_an_address_may_be_a_name_or_a_number(tmp_path: Path, address: str) -> None:
    """IPv6 stands in brackets, as in a URL."""
    assert read(tmp_path, SETTINGS.replace("coordinator.example:9092", address)).coordinator == address


@pytest.mark.parametrize("text", [None, "name = ", "name = 1979-05-27", "\udcff"])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    """Missing, broken, not UTF-8, or with a type that no setting has: one error, which names the file."""
    path = tmp_path / "hospital.toml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ConfigError, match=r"hospital\.toml"):
        read_settings(path)
