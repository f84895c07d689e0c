"""Captions of a sample: their fields in a shard, the filter, and the normal form by which duplicates are found."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from sacl_ds.config import CaptionFilter


class BadText(ValueError):
    """Text that cannot be read; the message says why, the same for all of a kind."""


def decoded(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises BadText."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadText("text is not UTF-8") from None
    if "\0" in text:  # of UTF-16, say, all in English
        raise BadText("text is not UTF-8")
    return text


def captions_of(fields: dict[str, Any]) -> list[str]:
    """Return all captions: from the first non-empty of the .json's list 'captions', the .txt, the .json's 'caption'.

    Raises BadText for what is not UTF-8, and for half a surrogate pair, which JSON can spell.
    """
    meta: Any = {}
    if "json" in fields:
        try:
            meta = json.loads(decoded(fields["json"]))
        except BadText:
            raise
        except (ValueError, RecursionError):
            meta = {}
    meta = meta if isinstance(meta, dict) else {}
    said = _said(meta.get("captions"))
    if not said and "txt" in fields:
        said = _said(decoded(fields["txt"]))
    said = said or _said(meta.get("caption"))
    for caption in said:
        require_unicode(caption)
    return said


def require_unicode(text: str) -> str:
    """Return the text unchanged. Raises BadText where half a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadText("text is not valid Unicode") from None
    return text


def _said(given: Any) -> list[str]:
    """List the texts that are not blank, of one or a list."""
    several = given if isinstance(given, list) else [given]
    return [caption.strip() for caption in several if isinstance(caption, str) and caption.strip()]


def wanted(captions: Sequence[str], only: CaptionFilter) -> list[int]:
    """Return the indices of the captions that pass the filter."""
    if only.accepts_all:
        return list(range(len(captions)))
    return [number for number, caption in enumerate(captions) if _passes(caption, only)]


def normalised(caption: str) -> str:
    """Normalise a caption so that it equals those that a reader calls the same: case, spaces and punctuation aside.

    Marks belong to their letters, in any script. Signs count: emoji, + < > = # % & * /, faces such as :) and what
    stands within or before a number (3.5, -5). A caption of punctuation alone is itself.
    """
    text = caption.casefold()
    if not text.isascii():
        text = unicodedata.normalize("NFD", caption).translate(_RAISED)
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _DASH.sub("-", unicodedata.normalize("NFC", text.translate(_SEEN)))
    parts = _COUNTS.split(text)  # at odd places what counts
    parts[::2] = [part.translate(_SPOKEN) for part in parts[::2]]
    return " ".join("".join(parts).split()) or " ".join(text.split())


class _Table(dict[int, str]):
    """Translation table for `str.translate`, filled when a character is first met."""

    def __init__(self, told: Callable[[str], str]) -> None:
        self._told = told

    def __missing__(self, code: int) -> str:
        self[code] = self._told(chr(code))
        return self[code]


def _raised(character: str) -> str:
    """Keep superscripts apart from digits: 5² is not 52."""
    return f"^{character}" if unicodedata.decomposition(character).startswith("<super>") else character


def _seen(character: str) -> str:
    """Remove invisible characters (joiners, marks of direction, fillers), but for the tags of regions' flags.

    Flags of regions are told apart by such characters.
    """
    code = ord(character)
    hidden = unicodedata.category(character) == "Cf" and not 0xE0020 <= code <= 0xE007F
    return "" if hidden or any(code in unseen for unseen in _UNSEEN) else character


def _spoken(character: str) -> str:
    """Keep letters, marks and numbers, set signs apart from their neighbours, replace all else by a space."""
    kind = unicodedata.category(character)
    if kind[0] in "LMN":
        return character
    silent = kind[0] == "Z" or kind == "Cc" or (kind[0] == "P" and character not in _SIGNS)
    return " " if silent else f" {character} "


_RAISED, _SEEN, _SPOKEN = _Table(_raised), _Table(_seen), _Table(_spoken)
_SIGNS = "#%&*/@\\§†‡‰‱′″‴٪"  # that Unicode calls punctuation
_UNSEEN = (  # beside those of category Cf
    (0x034F, 0x0640, 0x115F, 0x1160, 0x3164, 0xFFA0),
    *(range(*ends) for ends in ((0x17B4, 0x17B6), (0x180B, 0x1810), (0xFE00, 0xFE10), (0xE0100, 0xE01F0))),
)
_DASH = re.compile("[\u2010-\u2015\u2212]")
# within a number, before one, a face
_COUNTS = re.compile(r"((?<=\d)[.,:-](?=\d)|(?<!\w)[.-](?=\d)|(?<!\S)[:;=]['-]?[()\[\]{}|/\\])")


def _passes(caption: str, only: CaptionFilter) -> bool:
    count = len(caption.split())
    if count < only.min_words or (only.max_words is not None and count > only.max_words):
        return False
    return only.exclude is None or not _pattern(only.exclude).search(caption)


@cache
def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
