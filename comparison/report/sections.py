"""What a page is made of, for the report and for every study: a headline, and sections of text, charts and tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unlocked.comparison.report.figures import Picture, require_plotting
from unlocked.comparison.results import Contender

__all__ = ["Headline", "Section", "Table", "render"]

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The page in one sentence, and the conditions under which it holds."""

    sentence: str
    conditions: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers of a section. `words` are the columns that hold sentences."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: tuple[int, ...] = ()

    def is_words(self, column: int) -> bool:
        return column in self.words


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; `key` is unique on it."""

    key: str
    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = field(default=())


def render(title: str, headline: Headline, sections: Sequence[Section], missing: Sequence[Contender] = ()) -> str:
    """The page's text. Raises: ValueError where jinja2 is not installed."""
    require_plotting()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    from markupsafe import Markup

    css = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    template = environment.get_template("page.html")
    return template.render(title=title, headline=headline, sections=sections, missing=missing, css=css)
