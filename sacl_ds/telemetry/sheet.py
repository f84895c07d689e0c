"""Sheets of pictures with text below them as one PNG, for papers and slides; the report page has them as HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE = 10, 17  # pixels
_INK, _FAINT, _PAPER, _FRAME = "#111111", "#666666", "#ffffff", "#eeeeee"
MARKED, PLAIN, FIRST = "#1c7c3c", "#d8d8d8", "#1f5fa8"  # frames


class TileSize(NamedTuple):
    """Size of a tile: its width and the height of its picture in pixels, and how many lines its captions may take."""

    width: int
    picture: int
    lines: int


SMALL, LARGE = TileSize(190, 150, 4), TileSize(300, 225, 8)


@dataclass(frozen=True)
class Tile:
    picture: Image.Image | None
    captions: Sequence[str]
    figures: Sequence[str] = ()
    frame: str = PLAIN


def draw_rows(rows: Sequence[tuple[str, Sequence[Tile]]], path: Path, size: TileSize = SMALL) -> None:
    """Write a PNG of rows, each with a heading above, '' for none."""
    text, small = _font(13), _font(12)
    columns = max((len(tiles) for _, tiles in rows), default=1)
    captions = [[caption_lines(tile.captions, size, text.getlength) for tile in tiles] for _, tiles in rows]
    heights = [
        _LINE * (bool(heading) + max(len(lines) + len(tile.figures) for tile, lines in zip(tiles, said, strict=True)))
        + size.picture
        + 3 * _GAP
        for (heading, tiles), said in zip(rows, captions, strict=True)
    ]
    sheet = Image.new("RGB", (columns * (size.width + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for (heading, tiles), said, height in zip(rows, captions, heights, strict=True):
        draw.text((_GAP, top), fitted(heading, sheet.width - 2 * _GAP, text.getlength), _FAINT, text)
        for number, (tile, lines) in enumerate(zip(tiles, said, strict=True)):
            left, y = _GAP + number * (size.width + _GAP), top + (_LINE if heading else 0) + 4
            _picture(sheet, draw, tile, (left, y), size)
            y += size.picture + 6
            for line in lines:
                draw.text((left, y), line, _INK, text)
                y += _LINE
            for line in tile.figures:
                draw.text((left, y), fitted(line, size.width, small.getlength), _FAINT, small)
                y += _LINE
        top += height
    sheet.save(path, "png", optimize=True)


def draw_matrix(
    tiles: Sequence[Tile], cells: Sequence[Sequence[tuple[str, tuple[int, int, int] | None]]], path: Path
) -> None:
    """Write a PNG of a table of (text, colour): row i headed by tile i's picture, column j by tile j's caption."""
    text, small, side, head = _font(15), _font(12), 104, 92
    size = side + len(tiles) * side + _GAP
    sheet = Image.new("RGB", (size, head + len(tiles) * side + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        lines = wrapped(tile.captions[0], side - 8, small.getlength, 5)
        for line_number, line in enumerate(lines):
            y = head - 6 - (len(lines) - line_number) * 16
            draw.text((side + number * side + 4, y), line, _INK, small)
        if tile.picture is not None:
            picture = scaled(tile.picture, side - 8, side - 8)
            offset = (side - picture.width) // 2, (side - picture.height) // 2
            sheet.paste(picture, (offset[0], head + number * side + offset[1]))
    for i, row in enumerate(cells):
        for j, (said, colour) in enumerate(row):
            box = side + j * side, head + i * side, side + (j + 1) * side - 3, head + (i + 1) * side - 3
            draw.rectangle(box, fill=colour or _FRAME)
            lines = said.split("\n")
            for number, line in enumerate(lines):
                font = text if number == 0 else small
                width = draw.textlength(line, font=font)
                middle = (box[1] + box[3]) // 2 - 9 * len(lines) + 18 * number
                draw.text(((box[0] + box[2] - width) / 2, middle), line, _INK if colour else _FAINT, font)
    sheet.save(path, "png", optimize=True)


def caption_lines(captions: Sequence[str], size: TileSize, width_of: Callable[[str], float]) -> list[str]:
    """Break captions into lines of a tile, a dash before each of several; the last line counts what did not fit."""
    lines: list[str] = []
    for number, caption in enumerate(captions):
        # data sets that put a blank before a full stop would have it begin a line
        tidy = re.sub(r" ([.,;:!?]+)(?= |$)", "\u00a0\\1", " ".join(caption.split()))
        said, left = f"– {tidy}" if len(captions) > 1 else tidy, len(captions) - number
        room = size.lines - len(lines) - (left > 1)  # a line for '+ 3 more'
        if lines and len(wrapped(said, size.width, width_of, room + 1)) > room:
            return [*lines, f"+ {left} more"]
        lines += wrapped(said, size.width, width_of, room)
    return lines


def wrapped(text: str, width: float, width_of: Callable[[str], float], lines: int) -> list[str]:
    """Break a text into at most `lines` lines, between words where possible; a text that does not fit ends in '…'."""
    result: list[str] = []
    rest = text
    while rest and len(result) < lines:
        if len(result) == lines - 1:
            result.append(fitted(rest, width, width_of))
            break
        end = _fits(rest, width, width_of)
        if end < len(rest):
            space = rest.rfind(" ", 0, end + 1)
            end = space if space > 0 else end
        result.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return result


def fitted(text: str, width: float, width_of: Callable[[str], float]) -> str:
    """Return the text, or its beginning followed by '…'."""
    if width_of(text) <= width:
        return text
    return f"{text[: _fits(text, width - width_of('…'), width_of)].rstrip()}…"


def scaled(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture to the largest size that fits; small ones by whole factors, so that their pixels stay sharp."""
    scale = min(width / picture.width, height / picture.height)
    if scale >= 2:
        return picture.resize((picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _fits(text: str, width: float, width_of: Callable[[str], float]) -> int:
    """Return how many characters of the text fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(text[:middle]) <= width else (low, middle - 1)
    return low


def _picture(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, corner: tuple[int, int], size: TileSize
) -> None:
    left, top = corner
    box = left, top, left + size.width - 1, top + size.picture - 1
    draw.rectangle(box, fill=_FRAME)
    if tile.picture is not None:
        picture = scaled(tile.picture.convert("RGB"), size.width - 6, size.picture - 6)
        sheet.paste(picture, (left + (size.width - picture.width) // 2, top + (size.picture - picture.height) // 2))
    draw.rectangle(box, outline=tile.frame, width=1 if tile.frame == PLAIN else 3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's own font: it has Greek, Cyrillic and the accents, and is there wherever plots are
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(fonts), size)
