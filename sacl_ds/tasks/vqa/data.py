"""Spelling of answers as the official VQA v2 evaluation normalises them before comparison.

The rules, with their oddities, are those of `VQAEval.processPunctuation` and `processDigitArticle` in
PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA, as the published figures use them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, Protocol, overload

from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from sacl_ds.data.captions import require_unicode
from sacl_ds.data.draws import words
from sacl_ds.data.json_files import each_entry, read_json
from sacl_ds.data.pictures import Picture
from sacl_ds.data.scenes import VERSION, Scenes
from sacl_ds.data.text import SPECIAL, Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.tasks.examples import ImageFile, SceneImage

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
    text, or a comma between digits does; elsewhere a space takes its place. Of the periods with no digit after them
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


def with_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer that also knows the words of `texts` which come out as unknown so far.

    Digits may be such words, where no caption had one: all of them would be the same answer. New ids follow the others,
    which stay what they are. The result is the same for the same texts in any order; `tokenizer` itself is returned
    where nothing is unknown, or where its vocabulary is no WordPiece one. A model grows with it (`tasks.vqa.model`).
    """
    backend = tokenizer.fast.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "WordPiece":
        return tokenizer
    unknown = backend.token_to_id(str(tokenizer.fast.unk_token))
    words: set[str] = set()
    for text in texts:
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)))
    # one by one: a word is added whole where any of it cannot be spelt
    backend.no_truncation()
    new = [word for word in sorted(words) if unknown in backend.encode(word, add_special_tokens=False).ids]
    if not new:
        return tokenizer
    vocabulary = state["model"]["vocab"]
    vocabulary |= {word: number for number, word in enumerate(new, tokenizer.size)}
    state["truncation"] = state["padding"] = None  # of the last call, not of the vocabulary
    names = {name: getattr(tokenizer.fast, name) for name in SPECIAL}
    grown = PreTrainedTokenizerFast(tokenizer_object=RustTokenizer.from_str(json.dumps(state)), **names)
    return Tokenizer(grown, tokenizer.max_tokens)


VISUAL_GENOME_WEIGHT = 0.5  # of an answer that only one person gave, as in ALBEF


class PictureOf(Protocol):
    """Image that is read only when it is asked for."""

    @property
    def key(self) -> str:
        """Name of the image in error lines."""

    def picture(self) -> Picture:
        """Raises BadSample."""


@dataclass(frozen=True, slots=True)
class Question:
    """Question about one image.

    answers: what people answered, ten in VQA v2; [] where labels are absent. kind: the official question_type, "" where
    none is told. answer_type: "yes/no", "number" or "other"; "" likewise. chosen: the official multiple_choice_answer,
    "" where none is told. weight: what training's weights of the answers add up to.
    """

    image: PictureOf
    question: str
    question_id: int
    answers: list[str]
    kind: str = ""
    answer_type: str = ""
    chosen: str = ""
    weight: float = 1.0

    @property
    def key(self) -> str:
        """Name of the question, the same in any list of questions."""
        return f"{self.image.key}, question {self.question_id}"


def answer_weights(question: Question) -> dict[str, float]:
    """Map each distinct answer to its share of the given ones times the question's weight; {} without labels.

    ALBEF's weights: 1 / n for each of n given answers, 0.5 for Visual Genome's one. Spelt as the answers of
    `answer_list`, so that what is learned can be chosen.
    """
    given = Counter(map(_spelt, question.answers))
    return {answer: question.weight * count / len(question.answers) for answer, count in given.items()}


def answer_list(questions: Iterable[Question], at_least: int) -> list[str]:
    """The closed list of answers to choose from: the official answer of each question, if of so many questions or more.

    That is the multiple_choice_answer where the file tells it, otherwise the most frequent one (ties: the first by the
    alphabet), normalised. Sorted by frequency, then by the alphabet. With at_least=9, the train and val questions of
    VQA v2 give the list that is in common use, of some 3,130 answers (ALBEF's has 3,128).
    """
    counts: Counter[str] = Counter()
    for question in questions:
        if question.chosen:
            counts[_spelt(question.chosen)] += 1
        elif question.answers:
            given = Counter(map(_spelt, question.answers))
            counts[min(given, key=lambda answer: (-given[answer], answer))] += 1
    return sorted((each for each in counts if counts[each] >= at_least), key=lambda each: (-counts[each], each))


def vqa_questions(questions: Path, annotations: Path | None, images: Path) -> list[Question]:
    """Read an official questions file (v2_OpenEnded_mscoco_*_questions.json) with the answers of its annotations file.

    annotations: None where labels are absent (test sets). images: the folder that holds COCO's images,
    COCO_val2014_000000000042.jpg and the like, itself or in a folder val2014; 000000000042.jpg, 42.jpg and 42.png are
    found as well. A missing image is noticed only when it is read. Raises UserError with file and entry.
    """
    content = read_json(questions)
    entries = _entries(content, "questions", questions)
    subset = content.get("data_subtype", "")
    if not isinstance(subset, str):
        raise UserError(f"{questions}: data_subtype is not a text; give an official questions file of VQA v2")
    if "/" in subset or subset in (".", ".."):
        raise UserError(f"{questions}: data_subtype {subset[:80]!r} is no name such as val2014; correct it")

    image = cache(lambda image_id: _CocoImage(images, subset, image_id))

    def make(entry: Any) -> Question:
        return Question(
            image(_number(entry["image_id"])), _text(entry["question"]), _number(entry["question_id"]), answers=[]
        )

    made = each_entry(entries, lambda number: f"{questions} questions[{number}]", make)
    _no_duplicates(((number, each.question_id) for number, each in enumerate(made)), f"{questions} questions")
    return made if annotations is None else list(_labelled(made, questions, annotations))


def visual_genome_questions(file: Path, images: Path) -> list[Question]:
    """Read Visual Genome's question_answers.json, each question with its one answer at half weight, as ALBEF trains on
    them.

    images: the folder that holds VG_100K/ID.jpg, VG_100K_2/ID.jpg or ID.jpg. Raises UserError with file and entry.
    """

    @cache
    def image(image_id: int) -> ImageFile:
        places = (images / folder / f"{image_id}.jpg" for folder in ("VG_100K", "VG_100K_2", ""))
        return ImageFile(f"Visual Genome image {image_id}", tuple(places))

    def make(entry: Any) -> Question:
        about, text, number = image(_number(entry["image_id"])), _text(entry["question"]), _number(entry["qa_id"])
        return Question(about, text, number, [_text(entry["answer"])], weight=VISUAL_GENOME_WEIGHT)

    content = read_json(file)
    if not isinstance(content, list):
        raise UserError(f"{file}: not a list of images; give Visual Genome's question_answers.json")
    lists = each_entry(content, lambda number: f"{file} [{number}]", lambda entry: _list(entry["qas"]))
    made: list[Question] = []
    for outer, entries in enumerate(lists):
        made += each_entry(entries, lambda number, outer=outer: f"{file} [{outer}].qas[{number}]", make)  # type: ignore[misc]
    _no_duplicates(((number, each.question_id) for number, each in enumerate(made)), f"{file}, question")
    return made


class _Labels(NamedTuple):
    question_id: int
    image_id: int
    answers: list[str]
    kind: str
    answer_type: str
    chosen: str


def _labelled(made: Sequence[Question], questions: Path, annotations: Path) -> Iterator[Question]:
    def make(entry: Any) -> _Labels:
        return _Labels(  # the same few thousand texts, millions of times
            _number(entry["question_id"]),
            _number(entry["image_id"]),
            [intern(_text(each["answer"])) for each in _list(entry["answers"])],
            intern(_text(entry.get("question_type", ""))),
            intern(_text(entry.get("answer_type", ""))),
            intern(_text(entry.get("multiple_choice_answer", ""))),
        )

    entries = _entries(read_json(annotations), "annotations", annotations)
    found = each_entry(entries, lambda number: f"{annotations} annotations[{number}]", make)
    _no_duplicates(((number, each.question_id) for number, each in enumerate(found)), f"{annotations} annotations")
    labels = {each.question_id: each for each in found}
    for number, question in enumerate(made):
        own = labels.get(question.question_id)
        here = f"question_id {question.question_id} ({questions} questions[{number}])"
        if own is None:
            raise UserError(f"{annotations}: no labels for {here}; give the annotations of the same split")
        if not own.answers:
            raise UserError(f"{annotations}: no answers in the labels of {here}")
        if question.image.key != _image_key(own.image_id):
            raise UserError(
                f"{annotations}: {here} is about {question.image.key}, its labels about {_image_key(own.image_id)}; "
                f"give the annotations of the same split"
            )
        yield Question(
            question.image, question.question, own.question_id, own.answers, own.kind, own.answer_type, own.chosen
        )


@dataclass(frozen=True, slots=True)
class _CocoImage:
    """COCO image by its id; its candidate paths are made when it is read: half a million lists fill a gigabyte."""

    images: Path
    subset: str
    image_id: int

    @property
    def key(self) -> str:
        return _image_key(self.image_id)

    def picture(self) -> Picture:
        """Raises BadSample."""
        # test-dev's questions are about images of the whole test set
        subsets = [each for each in dict.fromkeys((self.subset, self.subset.replace("test-dev", "test"))) if each]
        full = [f"COCO_{each}_{self.image_id:012d}.jpg" for each in subsets]
        names = [*full, f"{self.image_id:012d}.jpg", f"{self.image_id}.jpg", f"{self.image_id}.png"]
        places = (self.images / folder / name for name in names for folder in ("", *subsets))
        return ImageFile(self.key, tuple(places)).picture()


def _image_key(image_id: int) -> str:
    return f"image {image_id}"


@lru_cache(maxsize=2**16)
def _spelt(answer: str) -> str:
    """Normalise an answer; lower-case it only, where nothing would be left of it, such as of the answer 'a'."""
    return normalise_answer(answer) or " ".join(answer.lower().split())


def _entries(content: Any, field: str, file: Path) -> list[Any]:
    found = content.get(field) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{file}: no list {field!r} in it; give an official {field} file of VQA v2")
    return found


def _no_duplicates(numbered: Iterable[tuple[int, int]], where: str) -> None:
    first: dict[int, int] = {}
    for number, question_id in numbered:
        if question_id in first:
            raise UserError(
                f"{where}[{number}]: the id {question_id} stands at [{first[question_id]}] already; every question "
                f"needs its own"
            )
        first[question_id] = number


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} where a whole number belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a text belongs")
    return require_unicode(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} where a list belongs")
    return value


_PEOPLE = 10
_IDS_OF_A_SCENE = 100  # more than it has questions
_WHICH = 5  # what the draw is for; `Scenes` has the numbers before it


class SceneQuestions(Sequence[Question]):
    """Training questions: number i is about scene i, drawn by (seed, i). They are made when they are read."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        asked = self.scenes.questions(index)
        return _question(self.scenes, index, words(1, VERSION, self.scenes.seed, index, _WHICH)[0] % len(asked), asked)


def scene_questions(scenes: Scenes) -> list[Question]:
    """List all questions about all scenes, for evaluation."""
    made: list[Question] = []
    for index in range(len(scenes)):
        asked = scenes.questions(index)
        made += [_question(scenes, index, which, asked) for which in range(len(asked))]
    return made


def _question(scenes: Scenes, index: int, which: int, asked: Sequence[tuple[str, str, str]]) -> Question:
    kind, question, answer = asked[which]
    answer_type = "number" if kind == "count" else "yes/no" if answer in ("yes", "no") else "other"
    number = index * _IDS_OF_A_SCENE + which
    return Question(SceneImage(scenes, index), question, number, [answer] * _PEOPLE, kind, answer_type, answer)
