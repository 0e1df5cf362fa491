"""The policy while the daemon runs: ``hospital.toml`` is read again before every message."""

import logging
from pathlib import Path

from client.settings import Settings, read_settings
from shared_models.errors import ConfigError

log = logging.getLogger("konsil.hospital")


class LiveSettings:
    """The settings that a process began with, and under them the policy as the file has it now.

    The file is a kilobyte: its bytes are compared at every message, so that no change is missed for its time or size.

    Guarantees:
        * A change of ``[policy]`` that is on the disk holds for the next message.
        * A file that is gone or invalid permits nothing, message by message, until it is mended; nothing of an older
          policy is used meanwhile.
        * No other section changes before a restart; the log says so.
    """

    def __init__(self, path: Path, began_with: Settings) -> None:
        self._path, self._began_with = path, began_with
        self._seen: bytes | None = None
        self._found: Settings | ConfigError = began_with

    def settings(self) -> Settings:
        """The settings for the message that is about to be answered.

        Raises:
            ConfigError: The file is missing or invalid.
        """
        content = self._content()
        if content is None or content != self._seen:
            self._seen, self._found = content, self._read()
        if isinstance(self._found, ConfigError):
            raise self._found
        return self._found

    def _content(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:
            return None

    def _read(self) -> Settings | ConfigError:
        try:
            fresh = read_settings(self._path)
        except ConfigError as error:
            return error
        began_with = self._began_with
        self._report(fresh)
        return began_with.model_copy(update={"policy": fresh.policy})

    def _report(self, fresh: Settings) -> None:
        """Say what changed: once, because the content is looked at once."""
        before = self._found.policy if isinstance(self._found, Settings) else None
        if fresh.policy != before:
            log.warning("the policy in %s changed; it holds from this message on", self._path.name)
        differ = [key for key in Settings.model_fields if getattr(fresh, key) != getattr(self._began_with, key)]
        if waiting := [key for key in differ if key != "policy"]:
            log.warning("%s: changes of %s need a restart of the daemon", self._path.name, ", ".join(waiting))
