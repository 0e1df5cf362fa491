"""From an empty folder to a pinned kit, with the commands that people type; and what is refused on the way."""

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.cli import app as hospital_app
from client.enrol import join
from client.settings import read_settings
from server.cli import app as coordinator_app
from server.pki import Authority
from server.settings import read_settings as read_coordinator
from shared_models.enrolment import read_request
from shared_models.errors import (
    ConfigError,
    FederationError,
    ForeignRosterError,
    GenesisError,
    NotAMemberError,
    OlderRosterError,
    RequestError,
    RosterSignatureError,
)
from shared_models.identity import fingerprint, load_key, public_bytes
from shared_models.roster import UnsignedRoster, sign_roster

ADDRESS = "127.0.0.1:19443"


def run(app: Any, *arguments: object) -> Result:
    """One command in this process; errors of ours are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, FederationError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@dataclass
class Consortium:
    """Folders of a coordinator and hospitals."""

    folder: Path
    address: str = ADDRESS

    def __post_init__(self) -> None:
        self.centre = self.folder / "centre"
        self.settings = self.centre / "coordinator.toml"

    def hospital(self, name: str) -> Path:
        """Where a hospital's settings lie."""
        return self.folder / name / "hospital.toml"

    def request(self, name: str) -> Path:
        """Where its request lies."""
        return self.folder / name / f"{name}.request.json"

    def kit(self, name: str) -> Path:
        """Where its kit lies."""
        return self.centre / "kits" / f"{name}.kit.json"

    def init(self, name: str) -> Result:
        """The hospital makes its folder."""
        figures = ("--public-size", 100, "--epsilon", 2, "--delta", 0.0005, "--order", 8)
        return run(hospital_app, "init", self.folder / name, "--name", name, "--coordinator", self.address, *figures)

    def enrol(self, name: str) -> Result:
        """The coordinator enrols it, having heard the right fingerprint."""
        shown = read_request(self.request(name).read_bytes()).fingerprint
        options = ("--settings", self.settings, "--fingerprint", shown)
        return run(coordinator_app, "enrol", self.request(name), *options)

    def sign(self) -> Result:
        """Whoever holds the root key signs, and kits are written."""
        root = self.centre / "root" / "root.key"
        options = ("--root-key", root, "--settings", self.settings)
        return run(coordinator_app, "sign", self.centre / "roster.next.json", *options)

    def join(self, name: str, *, root: str | None = None) -> Result:
        """The hospital takes its kit, having heard the root fingerprint."""
        shown = root or fingerprint(bytes.fromhex((self.centre / "root.pub").read_text("ascii")))
        return run(hospital_app, "join", self.hospital(name), self.kit(name), "--root-fingerprint", shown)

    def change_kit(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Somebody changes a kit on its way."""
        kit = json.loads(self.kit(name).read_bytes())
        change(kit)
        self.kit(name).write_text(json.dumps(kit), encoding="utf-8")

    def signed_with(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The signed roster with a change, signed by the real root key: a coordinator that enrolled carelessly."""
        fields = json.loads((self.centre / "roster.json").read_bytes())
        del fields["signature"]
        change(fields)
        root = load_key(self.centre / "root" / "root.key")
        return sign_roster(root, UnsignedRoster.model_validate_json(json.dumps(fields))).model_dump(mode="json")


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """A coordinator, and one hospital that was enrolled and has not joined yet."""
    made = Consortium(tmp_path)
    run(coordinator_app, "init", made.centre, "--address", ADDRESS)
    made.init("north")
    made.enrol("north")
    made.sign()
    return made


def test_a_hospital_joins_and_says_so(consortium: Consortium) -> None:
    """Status shows both fingerprints, the members, the ledger and the budget."""
    consortium.join("north")

    facts = json.loads(run(hospital_app, "status", consortium.hospital("north"), "--json").output)

    assert facts["members"] == ["north"]
    assert facts["roster_version"] == 1
    assert facts["epsilon_left"] == 2.0
    assert facts["fingerprint"] in run(coordinator_app, "roster", "--settings", consortium.settings).output
    assert "north" in run(hospital_app, "status", consortium.hospital("north")).output


def test_private_keys_stay_private(consortium: Consortium) -> None:
    """Every private key is 0600, and none is in a request or a kit."""
    files = [*(consortium.folder / "north" / "keys").glob("*.key"), *consortium.centre.rglob("*.key")]

    assert len(files) == 6
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    for file in (consortium.request("north"), consortium.kit("north")):
        assert "PRIVATE" not in file.read_text("utf-8")


def test_nothing_is_overwritten(consortium: Consortium) -> None:
    """Neither a hospital nor a coordinator is made twice in one folder."""
    before = (consortium.folder / "north" / "keys" / "identity.key").read_bytes()

    with pytest.raises(ConfigError, match="exists already"):
        consortium.init("north")
    with pytest.raises(ConfigError, match="exists already"):
        run(coordinator_app, "init", consortium.centre, "--address", ADDRESS)

    assert (consortium.folder / "north" / "keys" / "identity.key").read_bytes() == before


def test_figures_that_no_budget_can_have_leave_nothing_half_done(tmp_path: Path) -> None:
    """The same folder can be used with better ones."""
    made = Consortium(tmp_path)
    for figures in (("--delta", 0.5, "--order", 8), ("--delta", 0.0005, "--order", 2)):
        options = ("--name", "north", "--coordinator", ADDRESS, "--public-size", 100, "--epsilon", 1, *figures)
        with pytest.raises(ConfigError):
            run(hospital_app, "init", tmp_path / "north", *options)
        assert list((tmp_path / "north").iterdir()) == []

    made.init("north")


@pytest.mark.parametrize("field", ["public_size", "node_key", "identity"])
def test_a_forged_request_is_refused(consortium: Consortium, field: str) -> None:
    """Whatever is changed on the way, the hospital's signature does not fit any more."""
    consortium.init("south")
    other = json.loads(consortium.request("north").read_bytes())
    changed = json.loads(consortium.request("south").read_bytes())
    changed[field] = 7 if field == "public_size" else other[field]
    consortium.request("south").write_text(json.dumps(changed), encoding="utf-8")

    with pytest.raises(RequestError, match="is forged"):
        consortium.enrol("south")


def test_a_fingerprint_that_was_not_read_out_admits_nobody(consortium: Consortium) -> None:
    """A request made by somebody in the middle is signed in due form; only the telephone tells."""
    consortium.init("south")
    staged = consortium.centre / "roster.next.json"
    before = staged.read_bytes()

    options = ("--settings", consortium.settings, "--fingerprint", "0000")
    with pytest.raises(RequestError, match="was not confirmed"):
        run(coordinator_app, "enrol", consortium.request("south"), *options)

    assert staged.read_bytes() == before


def test_a_root_key_that_was_not_read_out_is_not_pinned(consortium: Consortium) -> None:
    """The first kit is believed for its fingerprint alone."""
    with pytest.raises(RequestError, match="was not confirmed"):
        consortium.join("north", root="0000")

    assert not (consortium.folder / "north" / "keys" / "root.pub").exists()


def test_a_name_is_given_once(consortium: Consortium) -> None:
    """Also not to the same hospital with new keys."""
    with pytest.raises(RequestError, match="on the roster already"):
        consortium.enrol("north")


def test_an_unsigned_kit_is_refused(consortium: Consortium) -> None:
    """The staged roster is not a roster."""
    consortium.change_kit("north", lambda kit: kit["roster"].pop("signature"))

    with pytest.raises(RosterSignatureError, match="is not signed"):
        consortium.join("north")


def test_a_substituted_key_in_a_kit_is_found_by_the_signature(consortium: Consortium) -> None:
    """Whoever carries the kit cannot change the hospital's key on it."""
    consortium.change_kit("north", lambda kit: kit["roster"]["members"][0].update(identity="a" * 64))

    with pytest.raises(RosterSignatureError, match="not the consortium's"):
        consortium.join("north")


def test_a_substituted_key_that_the_root_signed_is_found_by_its_owner(consortium: Consortium) -> None:
    """A coordinator that put another key in the hospital's place is found out by the hospital."""
    roster = consortium.signed_with(lambda fields: fields["members"][0].update(identity="a" * 64))
    consortium.change_kit("north", lambda kit: kit.update(roster=roster))

    with pytest.raises(NotAMemberError, match="other keys than its own"):
        consortium.join("north")


def test_another_ledger_than_the_enrolled_one_is_refused(consortium: Consortium) -> None:
    """The budget that was announced is the one that must be in use."""
    roster = consortium.signed_with(lambda fields: fields["members"][0].update(ledger_genesis="a" * 64))
    consortium.change_kit("north", lambda kit: kit.update(roster=roster))

    with pytest.raises(GenesisError, match="another first entry"):
        consortium.join("north")


def test_a_substituted_authority_is_refused(consortium: Consortium) -> None:
    """Otherwise whoever carries the kit could sit between hospital and coordinator."""
    foreign = Authority(consortium.folder / "foreign").certificate.read_text("ascii")
    consortium.change_kit("north", lambda kit: kit.update(authority=foreign))

    with pytest.raises(RequestError, match="another TLS authority"):
        consortium.join("north")


def test_the_root_key_is_pinned_once(consortium: Consortium) -> None:
    """Another root key later is refused, whatever fingerprint is typed."""
    consortium.join("north")
    root = Ed25519PrivateKey.generate()
    consortium.change_kit("north", lambda kit: kit.update(root=public_bytes(root).hex()))

    with pytest.raises(ForeignRosterError, match="another root key"):
        join(read_settings(consortium.hospital("north")), consortium.kit("north"), confirm=lambda _: True)


def test_settings_states_and_records_may_lie_in_different_places(tmp_path: Path) -> None:
    """As in /etc and /var/lib: keys and settings stay together, and the registry lies beside the states."""
    home, elsewhere = tmp_path / "etc", tmp_path / "var"
    elsewhere.mkdir()
    figures = ("--public-size", 100, "--epsilon", 2, "--delta", 0.0005, "--order", 8)
    places = ("--state", elsewhere / "state", "--records", tmp_path / "export")

    run(hospital_app, "init", home, "--name", "north", "--coordinator", ADDRESS, *figures, *places)
    run(coordinator_app, "init", tmp_path / "centre", "--address", ADDRESS, "--state", elsewhere / "centre")

    settings = read_settings(home / "hospital.toml")
    assert (elsewhere / "state" / "ledger.sqlite").exists()
    assert not (home / "state").exists()
    assert settings.records == tmp_path / "export"
    assert settings.registry_folder == elsewhere / "registry"
    assert settings.keys.identity == home / "keys" / "identity.key"
    assert read_coordinator(tmp_path / "centre" / "coordinator.toml").state == elsewhere / "centre"


def test_a_later_kit_is_newer_and_an_older_one_refused(consortium: Consortium) -> None:
    """A revocation stages the next version; the kit from before is history."""
    consortium.join("north")
    old = consortium.kit("north").read_bytes()
    consortium.init("south")
    consortium.enrol("south")
    consortium.sign()
    assert "version 2, 2 hospitals" in consortium.join("north").output
    run(coordinator_app, "revoke", "south", "--settings", consortium.settings)
    consortium.sign()
    assert "version 3" in consortium.join("north").output
    assert "revoked" in run(coordinator_app, "roster", "--settings", consortium.settings).output
    consortium.kit("north").write_bytes(old)

    with pytest.raises(OlderRosterError, match="version 1 is older than version 3"):
        consortium.join("north")


def test_a_version_is_signed_once(consortium: Consortium) -> None:
    """Signing the staged file again, changed or not, is refused: two lists of one version would be a fork."""
    with pytest.raises(OlderRosterError, match="is signed already"):
        consortium.sign()
