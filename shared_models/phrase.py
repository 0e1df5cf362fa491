"""A sentence in English that can still be said in another language: it knows its template and its figures."""

from typing import Any, Self


class Phrase(str):
    """English text, made of a template and the values in it; what reads it as text needs to know no more.

    A catalogue of another language has its translations by the template, as gettext has them by the original.

    Args:
        template: With ``{placeholders}``.
        values: For them; a value can be a phrase itself.
    """

    __slots__ = ("template", "values")
    template: str
    values: dict[str, Any]

    def __new__(cls, template: str, /, **values: Any) -> Self:
        """The text; nothing in a value is taken for a placeholder."""
        text = super().__new__(cls, template.format(**values))
        text.template, text.values = template, values
        return text
