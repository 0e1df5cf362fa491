"""Each hospital's newest receipt, over all studies of this coordinator, shown to the hospital that signed it."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared_models.config import Name, explain
from shared_models.durable import replace_file
from shared_models.errors import ConfigError, UnsupportedFileError
from shared_models.receipts import Anchor, SignedReceipt, digest_of_all
from shared_models.versions import refuse_version

_Receipts = TypeAdapter(dict[Name, SignedReceipt])


class LastReceipts:
    """The file of newest receipts, read once and replaced after every sum; one coordinator at a time writes it.

    Raises:
        ConfigError: The file is damaged. To go on without it would let rolled-back hospitals go unnoticed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._last = _Receipts.validate_json(path.read_bytes()) if path.exists() else {}
        except (OSError, ValidationError) as error:
            if isinstance(error, ValidationError):
                refuse_version(error, str(path), UnsupportedFileError)
            text = explain(error) if isinstance(error, ValidationError) else error.strerror
            raise ConfigError(
                f"{path} cannot be read: {text}",
                hint="Restore it from a backup: hospitals' ledgers are checked against it.",
            ) from None

    def anchor(self, hospital: str) -> Anchor:
        """What to show a hospital: its own last receipt, and the digest of everybody's."""
        return Anchor(last=self._last.get(hospital), everybody=digest_of_all(self._last))

    def keep(self, receipts: Mapping[str, SignedReceipt]) -> None:
        """Remember newer receipts; on the disk when this returns."""
        if receipts:
            self._last = {**self._last, **receipts}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, _Receipts.dump_json(self._last))
