"""What a browser would make of a page, without a browser."""

from html.parser import HTMLParser


class Markup(HTMLParser):
    """A page's tags, in order, each with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One tag, with its attributes."""
        self.tags.append((tag, dict(attrs)))
