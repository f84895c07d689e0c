"""Elements of a report, and their rendering as one HTML file."""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

_LONGEST = 300  # characters of a caption; the page clamps what is shown to some lines of it
_THUMBNAIL = 160  # pixels of the longer side
_PIXEL_ART = 96  # pictures up to this size are kept to the pixel


@dataclass(frozen=True)
class Plot:
    """A picture that was drawn from numbers."""

    path: Path
    title: str
    alt: str  # what it shows, for those who cannot see it
    note: str = ""

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Table:
    """Cells are text; a row's first cell is its heading. words: cells that may be broken into lines, not numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Card:
    """Image-text pair. picture: a data URI, or None where it was not found."""

    picture: str | None
    caption: str
    lines: Sequence[str] = ()  # figures, one a line
    badge: str = ""
    good: bool | None = None  # colour of the badge
    pixelated: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of cards. first: stands apart, before the others. heading: above this strip and those after it."""

    title: str
    cards: Sequence[Card]
    first: Card | None = None
    heading: str = ""


@dataclass(frozen=True)
class Cell:
    text: str
    shade: str = ""  # CSS colour over the page's
    note: str = ""


@dataclass(frozen=True)
class Matrix:
    """Cells of row i (the picture of pairs[i]) and column j (the caption of pairs[j])."""

    title: str
    pairs: Sequence[Card]
    cells: Sequence[Sequence[Cell]]


@dataclass
class Section:
    """A part of the report. numbers: what report.json has of it."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    matrix: Matrix | None = None
    strips: list[Strip] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Headline:
    """A figure that is shown first."""

    value: str
    label: str


def render(title: str, subtitle: str, headlines: Sequence[Headline], sections: Sequence[Section]) -> str:
    """The page as HTML; all text is escaped."""
    return _template().render(title=title, subtitle=subtitle, headlines=headlines, sections=sections)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("sacl_ds.analysis.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["clean"] = clean
    return environment.get_template("report.html.j2")


def clean(text: str, longest: int = _LONGEST) -> str:
    """Text that any page can hold: no control characters or halves of surrogate pairs, and not endless.

    Marks that change the writing direction of what follows are dropped with the other control characters.
    """
    # a long run of combining marks is one endless glyph: what is cut is counted in characters
    text = text.encode("utf-8", "replace").decode()
    kept = "".join(" " if c.isspace() or unicodedata.category(c) in ("Cc", "Co", "Cn") else c for c in text)
    kept = "".join(c for c in kept if unicodedata.bidirectional(c) not in _DIRECTIONS)
    kept = " ".join(kept.split())
    return kept if len(kept) <= longest else kept[: longest - 1].rstrip() + "…"


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def card(picture: Image.Image | None, caption: str, **more: Any) -> Card:
    """A card with its thumbnail."""
    small = picture is not None and max(picture.size) <= _PIXEL_ART
    return Card(None if picture is None else data_uri(picture), clean(caption), pixelated=small, **more)


def data_uri(picture: Image.Image) -> str:
    """A thumbnail: small pictures as PNG to the pixel, others as JPEG."""
    buffer = io.BytesIO()
    if max(picture.size) <= _PIXEL_ART:
        picture.convert("RGB").save(buffer, "png", optimize=True)
        kind = "png"
    else:
        scale = _THUMBNAIL / max(picture.size)
        size = [max(1, round(side * min(scale, 1))) for side in picture.size]
        picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(value: float | int | None, digits: int = 3) -> str:
    """A number for a reader: so many significant digits, no exponent between 1e-4 and 1e6; '–' where unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or float(value).is_integer():
        text = f"{int(value):,}".replace(",", "\u202f")
    else:
        text = f"{value:#.{digits}g}".rstrip(".") if 1e-4 <= abs(value) < 1e6 else f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share in [0, 1] as per cent."""
    if value is None or not math.isfinite(value):
        return "–"
    value *= 100
    return f"{value:.1f}\u202f%" if value >= 1 or value == 0 else f"{value:.2g}\u202f%"


def plain(value: Any) -> Any:
    """Convert a value for JSON; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value
