"""Each hospital's newest receipt, over all studies of this coordinator, shown to the hospital that signed it."""

import threading
from collections.abc import Callable, Mapping
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

    Studies that run side by side share it.

    Raises:
        ConfigError: The file is damaged. To go on without it would let rolled-back hospitals go unnoticed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._one_at_a_time = threading.Lock()
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

    def anchors(self) -> Callable[[str], Anchor]:
        """What to show hospitals, as of now: each its own last receipt, and all the digest of everybody's."""
        last = self._last
        everybody = digest_of_all(last)
        return lambda hospital: Anchor(last=last.get(hospital), everybody=everybody)

    def keep(self, receipts: Mapping[str, SignedReceipt]) -> None:
        """Remember newer receipts; on the disk when this returns."""
        if not receipts:
            return
        with self._one_at_a_time:
            self._last = {**self._last, **receipts}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, _Receipts.dump_json(self._last))
