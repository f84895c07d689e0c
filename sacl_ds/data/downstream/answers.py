"""Spelling of answers as the official VQA v2 evaluation normalises them before comparison.

The rules, with their oddities, are those of `VQAEval.processPunctuation` and `processDigitArticle` in
PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA, as the published figures use them.
"""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the official code passes re.UNICODE, which is 32, where a substitution takes its greatest count
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_WITH_APOSTROPHES = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# a word that lacks one of its apostrophes gets it back; the official table has one entry the other way round, and
# some in capitals (Im, Ive, Id've), which no word can equal any more and which are left out
_CONTRACTIONS = {wrong: word for word in _WITH_APOSTROPHES.split() for wrong in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}


def trimmed_answer(text: str) -> str:
    """Replace line ends and tabs by spaces and strip: all that is done to answers on which everybody agrees."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """Normalise an answer: lower case, digits for zero to ten and none, no articles, contractions, no punctuation.

    Contractions get their known apostrophes. A mark goes without a trace where a space stands beside it anywhere in the
    text, or a comma between digits does; elsewhere a space takes its place. Of the periods with no digit behind them
    the first 32 go. So 'a/c' gives 'c', as 'a' is then an article, 'T-shirt' gives 't shirt', '1,000-2,000' gives
    '10002000'. May give the empty text.
    """
    text = trimmed_answer(text)
    grouped = _GROUPED_DIGITS.search(text) is not None
    kept = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or grouped else " ")
    kept = _PERIOD.sub("", kept, count=_PERIODS)
    words = [_DIGITS.get(word, word) for word in kept.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
