"""The two catalogues say the same: the same keys, the same placeholders, none too few and none too many."""

import ast
import re
import string
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.words import LANGUAGES, WEB, Said, Words, preferred, said, words
from shared_models import certificates, health
from shared_models.certificates import Expiry
from shared_models.phrase import Phrase
from shared_models.privacy.mechanisms import NEIGHBOURING, UNIT

PHRASED = [
    *(WEB.parent / name for name in ("doctor.py", "expiry.py")),
    *(Path(module.__file__ or "") for module in (certificates, health)),
]
OTHERS = [name for name in LANGUAGES if name != "en"]


def placeholders(text: str) -> set[tuple[str, str]]:
    """Names in braces, with the form in which they are written."""
    return {(name, form or "") for _, name, form, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("language", OTHERS)
def test_every_language_says_everything_with_the_same_figures(language: str) -> None:
    """A figure that one language leaves out, or rounds in another way, would be another disclosure."""
    english, other = words().texts, words(language).texts

    assert other.keys() == english.keys()
    assert {key for key in english if placeholders(other[key]) != placeholders(english[key])} == set()


@pytest.mark.parametrize("language", OTHERS)
def test_nothing_is_left_in_english(language: str) -> None:
    """But for texts without a word."""
    english, other = words().texts, words(language).texts

    same = {key for key in english if other[key] == english[key]}

    assert {key for key in same if re.search(r"[A-Za-z]{3}", re.sub(r"\{.*?\}", "", english[key]))} == set()


def test_every_key_is_used_and_every_key_that_is_used_is_there() -> None:
    """In the templates and in what the page and the commands say."""
    sources = "".join(path.read_text("utf-8") for path in [*WEB.glob("*.html"), *WEB.parent.glob("*.py")])
    quoted = set(re.findall(r'"([a-z][a-z-]*(?:\.[a-z][a-z-]*)?)"', sources))
    called = set(re.findall(r'(?:\bt|said)\(\s*"([^"]+)"\s*[,)]', sources))
    joined = set(re.findall(r'"([a-z]+)\." ~', sources)) | {"heading", "code", "status", "by", "health"}

    keys = set(words().texts)

    assert {key for key in called if key not in keys} == set()
    assert {key for key in keys - quoted if key.partition(".")[0] not in joined} == set()


@pytest.mark.parametrize("language", OTHERS)
def test_every_phrase_of_the_doctor_has_a_translation_with_the_same_figures(language: str) -> None:
    """None is left over, and none that a check can say is left in English; a finding's texts are phrases or codes."""
    said = {
        node.args[0].value: path.name
        for path in PHRASED
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Phrase"
        if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    }

    found = words(language).phrases

    assert found.keys() == said.keys()
    assert {text for text in found if placeholders(found[text]) != placeholders(text)} == set()
    assert {text for text in found if found[text] == text} == set()


def test_a_phrase_is_its_english_text_and_is_said_again_in_another_language() -> None:
    """A value can be a phrase; what others wrote is never taken for a placeholder, nor translated."""
    ends = Expiry(
        "page", Phrase("the certificate of steward {name}", name="{what}"), datetime(2026, 1, 2, tzinfo=UTC), ""
    )
    text = ends.text(datetime(2026, 1, 1, tzinfo=UTC))

    assert text == "the certificate of steward {what} expires on 2026-01-02, in 1 day"
    assert words().phrase(text) == str(text)
    assert words("zh-Hans").phrase(text).startswith("管理员 {what} 的证书将于 2026-01-02 到期")
    assert words("zh-Hans").phrase("not running") == "not running"


def test_the_relation_is_the_one_that_is_accounted_for() -> None:
    """The catalogue spells it out; it has to be what the mechanisms promise."""
    assert words()("fact.relation") == f"per {UNIT}, {NEIGHBOURING}"


def test_what_others_wrote_is_never_taken_for_a_placeholder() -> None:
    """A purpose can hold braces; they are only braces."""
    hostile = "{0} {text} {settings.keys} {{ 7 * 7 }} %s"

    assert words().say(said("verbatim", text=hostile)) == hostile
    assert words().say(said("fact.study", study=Said("verbatim", {"text": hostile}), digest="d")).startswith(hostile)


def test_a_word_that_no_catalogue_knows_is_shown_as_it_is() -> None:
    """A later release may have more codes."""
    assert words("zh-Hans")("code.brand-new") == words("zh-Hans").texts["code.other"].format(word="brand-new")
    with pytest.raises(KeyError):
        words()("studies.brand-new")


@pytest.mark.parametrize(
    ("wishes", "language"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-Hans"),
        ("en-GB,en;q=0.9,zh;q=0.5", "en"),
        ("de-DE,de;q=0.9,zh-Hans;q=0.5,en;q=0.1", "zh-Hans"),
        ("en;q=0.2, zh;q=0.7", "zh-Hans"),
        ("de", "en"),
        ("zh;q=x,;;;,*", "en"),
    ],
)
def test_a_browser_gets_the_language_that_it_asks_for_first(wishes: str, language: str) -> None:
    """Of those that there are."""
    assert preferred(wishes) == language


def test_another_language_is_english() -> None:
    """A cookie can say anything."""
    assert words("../../etc/passwd").language == "en"
    assert isinstance(words("zh-Hans"), Words)
