"""The official VQA v2 accuracy, against cases worked out by hand from its rules."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sacl_ds.tasks.examples import ImageFile
from sacl_ds.tasks.vqa.data import Question
from sacl_ds.tasks.vqa.evaluation import majority_answers, majority_baseline, normalise_answer, vqa_accuracy

CASES = {
    # numbers: zero to ten and none, as whole words, and none beyond
    "two": "2",
    "None": "0",
    "zero": "0",
    "ten": "10",
    "eleven": "eleven",
    "twenty": "twenty",
    "two dogs": "2 dogs",
    "no one": "no 1",
    "twofold": "twofold",
    "TWO": "2",
    # articles
    "a dog": "dog",
    "An apple": "apple",
    "the the man": "man",
    "a": "",
    "theatre": "theatre",
    "in a park": "in park",
    # contractions: one apostrophe too few, put back
    "dont": "don't",
    "don't": "don't",
    "Isnt it": "isn't it",
    "couldntve": "couldntve",  # two are missing
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "yalld've": "yalld've",
    "y'alld've": "y'all'd've",
    "twas": "'twas",
    "oclock": "o'clock",
    "10 oclock": "10 o'clock",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",  # the one that goes the other way
    "somebodyd": "somebodyd",
    "Im": "im",  # the table has capitals, which no lower-cased word equals
    "Ive": "ive",
    "cant": "can't",
    "its": "its",  # not in the table, nor is shed
    "shed": "shed",
    # punctuation: a space in its place, or nothing where a space stands beside the same mark anywhere
    "black/white": "black white",
    "black / white": "black white",
    "red, white": "red white",
    "red,white": "red white",
    "a,b, c": "ab c",
    "t-shirt": "t shirt",
    "t-shirt -": "tshirt",
    "yes!": "yes",
    "what?!": "what",
    '"stop"': "stop",
    "(left)": "left",
    "user@home": "user home",
    "c:\\dir": "c: dir",
    "it's": "it's",  # apostrophes and colons stay
    "7:30": "7:30",
    "50%": "50%",
    # digits with a comma between them: every mark of the answer goes without a space
    "1,000": "1000",
    "1,000-2,000": "10002000",
    "9/11": "9 11",
    "9/11 1,5": "911 15",
    # periods: kept before a digit, whatever is before them; else they go
    "3.5": "3.5",
    ".5": ".5",
    "5.": "5",
    "u.s.a.": "usa",
    "a.1": "a.1",
    "...": "",
    "." * 40: "." * 8,  # the first 32 only
    # white space
    " yes ": "yes",
    "top\nleft": "top left",
    "top\tleft": "top left",
    "yes\n": "yes",
    "tall  dog": "tall dog",
    "": "",
    # order: marks before words, words before contractions
    "one-a": "1",
    "one.": "1",
    "a/c": "c",
    "don-t": "don t",
    "the.": "",
}


@pytest.mark.parametrize("text", CASES, ids=repr)
def test_normalised_by_hand(text: str) -> None:
    assert normalise_answer(text) == CASES[text]


WORDS = st.sampled_from(["the", "two", "none", "dont", "dog", "1,000", "3.5", "yes", "a", "T-shirt", "b/w ", "..", "é"])
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=4)), max_size=6).map(" ".join)


@given(TEXTS)
def test_twice_is_once(text: str) -> None:
    once = normalise_answer(text)
    if text.count(".") <= 32:
        assert normalise_answer(once) == once
    assert once == " ".join(once.split())
    assert not set(once) & set(';/[]"{}()=+\\_-><@`,?!')
    assert not set(once.split()) & {"a", "an", "the", "none", "zero", "ten"}


def by_definition(answer: str, given: list[str]) -> Fraction:
    """The rule as it is published: leave each person out in turn, count who of the others said it."""
    answer, given = answer.strip(), [each.strip() for each in given]
    if len(set(given)) > 1:
        answer, given = normalise_answer(answer), [normalise_answer(each) for each in given]
    shares = []
    for person in range(len(given)):
        others = given[:person] + given[person + 1 :]
        shares.append(min(Fraction(1), Fraction(sum(other == answer for other in others), 3)))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(
    ("answer", "said", "expected"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("green", ["red"] + ["blue"] * 9, 0.0),
        # fewer than ten
        ("red", ["red"] * 4, 1.0),
        ("red", ["red"] * 3, 2 / 3),
        ("red", ["red", "red", "blue"], (1 / 3 + 1 / 3 + 2 / 3) / 3),
        ("red", ["red", "blue"], (0 + 1 / 3) / 2),
        ("red", ["red"], 0.0),
        # spelt as the others where they differ, to the letter where all agree
        ("2", ["two"] * 9 + ["3"], 1.0),
        ("2", ["two"] * 10, 0.0),
        ("two", ["two\n"] * 10, 1.0),
        ("two ", ["two"] * 9 + ["two "], 1.0),
        ("Red", ["red"] * 10, 0.0),
        ("a dog", ["dog"] * 5 + ["the dog."] * 5, 1.0),
        ("dont", ["don't"] * 2 + ["dont"] + ["do not"] * 7, 0.9),
    ],
)
def test_accuracy_by_hand(answer: str, said: list[str], expected: float) -> None:
    assert vqa_accuracy(answer, said) == pytest.approx(expected)


ANSWERS = st.sampled_from(["red", "Red", "the red", "two", "2", " 2", "a", "", "dog.", "dog"])


@given(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_accuracy_by_definition(answer: str, said: list[str], random) -> None:
    value = vqa_accuracy(answer, said)
    assert 0 <= value <= 1
    assert value == pytest.approx(float(by_definition(answer, said)))
    shuffled = said[:]
    random.shuffle(shuffled)
    assert vqa_accuracy(answer, shuffled) == pytest.approx(value)


@given(ANSWERS, ANSWERS, st.integers(2, 12))
def test_accuracy_where_all_agree(answer: str, said: str, people: int) -> None:
    expected = min(1, (people - 1) / 3) if answer.strip() == said.strip() else 0
    assert vqa_accuracy(answer, [said] * people) == pytest.approx(expected)


def test_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="no given answers"):
        vqa_accuracy("red", [])


def asked(kind: str, *answers: str) -> Question:
    return Question(ImageFile("image 1", ()), "?", 1, list(answers), kind)


def test_majority() -> None:
    train = [
        asked("how many", *["2"] * 6, *["3"] * 4),  # a question counts once, shared among its answers
        asked("how many", *["3"] * 10),
        asked("is", "yes", "Yes", "no"),
        asked("is", "no"),
        asked("is"),
        asked("what", "b", "a"),
    ]
    answers = majority_answers(train)
    assert answers == {"": "3", "how many": "3", "is": "no", "what": "a"}
    held_out = [asked("how many", *["3"] * 10), asked("is", *["no"] * 3), asked("why", *["3"] * 4), asked("is")]
    # right, right for two of the three it needs, an unknown type gets the answer most frequent of all, no labels
    assert majority_baseline(train, held_out) == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert math.isnan(majority_baseline(train, [asked("is")]))
