"""The captions of a sample: where they stand, which are wanted, and which are the same."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from sacl_ds.config import CaptionFilter


def captions_of(fields: dict[str, Any]) -> list[str]:
    """All captions: the list 'captions' of the .json where there is one, else the .txt, else 'caption' of the .json."""
    meta: dict[str, Any] = {}
    if "json" in fields:
        try:
            loaded = json.loads(fields["json"])
            meta = loaded if isinstance(loaded, dict) else {}
        except (ValueError, RecursionError):
            meta = {}
    several = meta.get("captions")
    if isinstance(several, list):
        given = [caption for caption in several if isinstance(caption, str)]
    else:
        text = fields["txt"].decode("utf-8", "replace") if "txt" in fields else meta.get("caption")
        given = [text] if isinstance(text, str) else []
    whole = (caption.encode("utf-8", "replace").decode().strip() for caption in given)  # half an emoji is none
    return [caption for caption in whole if caption]


def wanted(captions: Sequence[str], only: CaptionFilter) -> list[int]:
    """Which captions pass the filter."""
    if only.accepts_all:
        return list(range(len(captions)))
    return [number for number, caption in enumerate(captions) if _passes(caption, only)]


def normalised(caption: str) -> str:
    """Equal for captions that say the same words: case, accents' encoding, spaces and punctuation aside."""
    words = re.sub(r"[^\w]+", " ", unicodedata.normalize("NFKC", caption).casefold())
    return words.strip()


def _passes(caption: str, only: CaptionFilter) -> bool:
    count = len(caption.split())
    if count < only.min_words or (only.max_words is not None and count > only.max_words):
        return False
    return only.exclude is None or not _pattern(only.exclude).search(caption)


@cache
def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
