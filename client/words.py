"""What the steward reads, on the page and in a terminal, in two languages: a catalogue each, with the same keys.

A sentence is a key and its values until it is read, so that the price on a Chinese page and the price in an English
terminal are one and the same.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from shared_models.phrase import Phrase

WEB = Path(__file__).with_name("web")
LANGUAGES = {"en": "English", "zh-Hans": "简体中文"}  # the first is the commands', and whoever wants another gets it


class Said(NamedTuple):
    """A sentence that is not in any language yet.

    Attributes:
        key: In the catalogues.
        values: For its placeholders: texts, numbers, other sentences, or lists of such.
    """

    key: str
    values: Mapping[str, Any]


def said(key: str, **values: Any) -> Said:
    """A sentence."""
    return Said(key, values)


class Words:
    """One language's catalogue.

    Args:
        language: One of ``LANGUAGES``.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self.texts: Mapping[str, str] = dict(_flat(_read(f"{language}.toml")))
        self.phrases: Mapping[str, str] = {} if language == "en" else _read(f"phrases.{language}.toml")

    def __call__(self, key: str, **values: Any) -> str:
        """The text of a key. What others wrote comes in as a value, and is never taken for a placeholder.

        Of a word from elsewhere, such as a code in ``code.CODE``, that the catalogue does not know: ``code.other``.
        """
        if key not in self.texts:
            table, _, values["word"] = key.partition(".")
            key = f"{table}.other"
        return self.texts[key].format(**{name: self._value(value) for name, value in values.items()})

    def say(self, sentence: Said) -> str:
        """The text of a sentence."""
        return self(sentence.key, **sentence.values)

    def phrase(self, text: str) -> str:
        """What a check says in English, in this language; a text that is no phrase stays as it is."""
        if not isinstance(text, Phrase):
            return text
        values = {name: self.phrase(value) if isinstance(value, str) else value for name, value in text.values.items()}
        return self.phrases.get(text.template, text.template).format(**values)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Said):
            return self.say(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return self.texts["comma"].join(str(self._value(one)) for one in value)
        return value


def _read(file: str) -> dict[str, Any]:
    return tomllib.loads((WEB / file).read_text("utf-8"))


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, str):
            yield above + key, value
        else:
            yield from _flat(value, f"{above}{key}.")


@lru_cache
def words(language: str = "en") -> Words:
    """The catalogue of a language; of one that there is not, English."""
    return Words(language if language in LANGUAGES else "en")


def preferred(accept_language: str) -> str:
    """The language that a browser asks for first, of those that there are."""
    wishes = []
    for wish in accept_language.split(","):
        tag, _, quality = wish.strip().lower().partition(";q=")
        try:
            wishes.append((-float(quality or 1), tag.partition("-")[0]))
        except ValueError:
            continue
    ours = {name.partition("-")[0]: name for name in LANGUAGES}
    return next((ours[tag] for _, tag in sorted(wishes, key=lambda wish: wish[0]) if tag in ours), "en")
