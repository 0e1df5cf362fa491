"""Each hospital's newest receipt, over all studies of this coordinator, shown to the hospital that signed it."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared_models.config import Name, explain
from shared_models.durable import replace_file
from shared_models.errors import ConfigError
from shared_models.receipts import Anchor, Digest, SignedReceipt, digest_of_all

_Receipts = TypeAdapter(dict[Name, SignedReceipt])


class LastReceipts:
    """The file of newest receipts, read once and replaced after every sum; one coordinator at a time writes it.

    Raises:
        ConfigError: The file is damaged. To go on without it would let rolled-back hospitals go unnoticed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._everybody: Digest | None = None  # of ``_last``; the same for every hospital of a round
        try:
            self._last = _Receipts.validate_json(path.read_bytes()) if path.exists() else {}
        except (OSError, ValidationError) as error:
            text = explain(error) if isinstance(error, ValidationError) else error.strerror
            raise ConfigError(
                f"{path} cannot be read: {text}",
                hint="Restore it from a backup: hospitals' ledgers are checked against it.",
            ) from None

    def anchor(self, hospital: str) -> Anchor:
        """What to show a hospital: its own last receipt, and the digest of everybody's."""
        if self._everybody is None:
            self._everybody = digest_of_all(self._last)
        return Anchor(last=self._last.get(hospital), everybody=self._everybody)

    def keep(self, receipts: Mapping[str, SignedReceipt]) -> None:
        """Remember newer receipts; on the disk when this returns."""
        if receipts:
            self._last, self._everybody = {**self._last, **receipts}, None
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, _Receipts.dump_json(self._last))
