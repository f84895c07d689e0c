"""Contact sheet of images with their captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from sacl_ds.data.images import open_image
from sacl_ds.data.inspection import Example

COLUMNS, ROWS = 5, 4
_WIDTH, _PICTURE, _MARGIN = 300, 225, 12  # pixels of a tile: its width, the height of its picture, the space around
_TEXT_SIZE, _LINE, _LINES = 14, 18, 8
_INK, _FAINT, _PAPER, _FRAME = "#111111", "#777777", "#ffffff", "#eeeeee"


def draw_sheet(examples: Sequence[Example], path: Path) -> None:
    """Write a PNG of at most COLUMNS * ROWS examples: picture, then shard and key, then as many captions as fit."""
    shown = examples[: COLUMNS * ROWS]
    rows = max(1, -(-len(shown) // COLUMNS))
    height = _PICTURE + (_LINES + 1) * _LINE + 6
    sheet = Image.new("RGB", (COLUMNS * (_WIDTH + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), _PAPER)
    # matplotlib's own font: it has Greek, Cyrillic and the accents, and is there wherever plots are
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    text, small = (ImageFont.truetype(str(fonts), size) for size in (_TEXT_SIZE, _TEXT_SIZE - 3))
    draw = ImageDraw.Draw(sheet)
    for number, example in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        left, top = _MARGIN + column * (_WIDTH + _MARGIN), _MARGIN + row * (height + _MARGIN)
        draw.rectangle((left, top, left + _WIDTH - 1, top + _PICTURE - 1), fill=_FRAME)
        picture = _fitted(example.image)
        sheet.paste(picture, (left + (_WIDTH - picture.width) // 2, top + (_PICTURE - picture.height) // 2))
        top += _PICTURE + 4
        where, width_of = f"{Path(example.shard).name}  {example.key}", partial(draw.textlength, font=small)
        draw.text((left, top), where if width_of(where) <= _WIDTH else _cut(where, width_of), _FAINT, small)
        for line in caption_lines(example.captions, partial(draw.textlength, font=text)):
            top += _LINE
            draw.text((left, top), line, _INK, text)
    sheet.save(path, "png")


def caption_lines(captions: Sequence[str], width_of: Callable[[str], float]) -> list[str]:
    """Break captions into lines of a tile's width, a dash before each; the last line counts what does not fit."""
    lines: list[str] = []
    for number, caption in enumerate(captions):
        # data sets that put a blank before a full stop would have it begin a line
        tidy = re.sub(r" ([.,;:!?]+)(?= |$)", "\u00a0\\1", " ".join(caption.split()))
        wrapped = _wrapped(tidy, width_of)
        left = len(captions) - number
        room = _LINES - len(lines) - (left > 1)  # a line for '+ 3 more'
        if lines and len(wrapped) > room:
            return [*lines, f"+ {left} more"]
        if len(wrapped) > room:
            wrapped = [*wrapped[: room - 1], _cut(wrapped[room - 1], width_of)]
        lines += wrapped
    return lines


def _wrapped(caption: str, width_of: Callable[[str], float]) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in caption.split(" "):
        if line and width_of(f"– {line} {word}") > _WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
        while width_of(f"– {line}") > _WIDTH:  # a word wider than a tile, as in languages without spaces
            fits = next((n for n in range(len(line) - 1, 1, -1) if width_of(f"– {line[:n]}") <= _WIDTH), 1)
            lines.append(line[:fits])
            line = line[fits:]
    lines.append(line)
    return [f"{' ' if number else '–'} {line}" for number, line in enumerate(lines)]


def _cut(line: str, width_of: Callable[[str], float]) -> str:
    """Cut a line to the width, with an ellipsis at its end."""
    while line and width_of(f"{line}…") > _WIDTH:
        line = line[:-1]
    return f"{line}…"


def _fitted(data: bytes) -> Image.Image:
    """Decode an image and scale it to fit a tile; small ones by whole factors, so that their pixels stay sharp."""
    encoded = open_image(data)
    encoded.draft("RGB", (_WIDTH, _PICTURE))
    image = encoded.convert("RGB")
    scale = min(_WIDTH / image.width, _PICTURE / image.height)
    if scale >= 2:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
