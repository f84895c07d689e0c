"""The built-in data: deterministic, its truths checked against a slow, independent reading of the sentences."""

import re

import numpy as np
import pytest

from sacl_ds.data.scene_language import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    relevance,
)
from sacl_ds.data.scenes import VERSION, Scenes

NAMES = (SHAPES, COLOURS, SIZES, TEXTURES, PLACES)


def said(text: str) -> tuple[list[dict[int, str]], str | None, str | None]:
    """Read a caption as a person would: (objects with their attributes, relation, background)."""
    background = re.search(r" on a (\w+) background$", text)
    text = re.sub(r" on a \w+ background$", "", text)
    text = re.sub(r"^there is ", "", text)
    relation = next((r for r in RELATIONS if f" {r} " in text), None)
    parts = re.split(rf" {relation} | and | with | , " if relation else " and | with | , ", text)
    things = []
    for part in parts:
        thing: dict[int, str] = {}
        place = next((p for p in sorted(PLACES, key=len, reverse=True) if part.endswith(p)), None)
        if place:
            thing[4] = place
            part = part.removesuffix(place)
        for word in part.split():
            for attribute, names in enumerate(NAMES[:4]):
                if word in names:
                    thing[attribute] = word
        things.append(thing)
    return things, relation, background[1] if background else None


def holds(text: str, scene: Scene) -> float:
    """The best share of the sentence's statements over all ways to match its objects to the scene's."""
    things, relation, background = said(text)
    count = sum(len(t) for t in things) + (relation is not None) + (background is not None)
    best = 0
    objects = [[names[v] for names, v in zip(NAMES, thing, strict=True)] for thing in scene.objects]
    for i, first in enumerate(objects):
        for j, second in enumerate(objects):
            if i == j:
                continue
            score = sum(first[a] == v for a, v in things[0].items())
            if len(things) > 1:
                score += sum(second[a] == v for a, v in things[1].items())
            if relation:
                (r1, c1), (r2, c2) = divmod(PLACES.index(first[4]), 3), divmod(PLACES.index(second[4]), 3)
                score += {"to the left of": c1 < c2, "to the right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}[
                    relation
                ]
            best = max(best, score)
    return (best + (BACKGROUNDS[scene.background] == background)) / count


@pytest.mark.parametrize("detail", ["partial", "simple", "detailed"])
def test_relevance_equals_reading_the_sentences(detail: str) -> None:
    scenes = Scenes(60, 5, detail=detail)
    matrix = scenes.relevance()
    texts = [caption.text for i in range(60) for caption in scenes.captions(i)]
    expected = np.array([[holds(text, scenes.scene(j)) for j in range(60)] for text in texts])
    np.testing.assert_allclose(matrix, expected, atol=1e-6)
    own = np.repeat(np.arange(60), 4)
    assert (matrix[np.arange(240), own] == 1).all()


def test_false_negatives_are_frequent_and_chance_is_low() -> None:
    matrix = Scenes(500, 1001).relevance()
    true = matrix == 1
    assert 0.02 < true.mean() <= 0.05
    assert (true.sum(1) > 1).mean() > 0.8  # most captions are true of another picture too
    assert ((matrix > 0) & ~true).mean() > 0.3  # and partly true of many


def test_what_a_version_generates_never_changes() -> None:
    """If this fails, pictures or sentences changed: raise VERSION, so that studies compare like with like."""
    assert VERSION == 1
    assert Scenes(64, 3).fingerprint() == "a647f85c7a3875e7bf5dfb0ec61c47a8cda5c846c4e58d6373204d97bd163a2b"


def test_items_depend_on_seed_and_index_alone() -> None:
    a, b = Scenes(10, 3)[7], Scenes(1000, 3)[7]
    assert (a.image == b.image).all()
    assert a.captions == b.captions
    assert Scenes(10, 4)[7].captions != a.captions
    with pytest.raises(IndexError):
        Scenes(10, 3)[10]


def test_pictures_show_what_is_said() -> None:
    """The mean colour inside a large plain object is nearest to its name's, on every background."""
    reference = {
        "red": (230, 40, 40),
        "green": (40, 170, 60),
        "blue": (50, 80, 220),
        "yellow": (235, 215, 50),
        "purple": (130, 50, 170),
    }
    right = total = 0
    scenes = Scenes(500, 8)
    for index in range(500):
        picture = scenes.image(index).astype(float)
        for shape, colour, size, texture, place in scenes.scene(index).objects:
            if SIZES[size] == "large" and TEXTURES[texture] == "plain" and SHAPES[shape] == "circle":
                row, column = divmod(place, 3)
                centre = picture[row * 16 + 5 : row * 16 + 11, column * 16 + 5 : column * 16 + 11].mean((0, 1))
                nearest = min(reference, key=lambda name: np.abs(centre - reference[name]).sum())
                right, total = right + (nearest == COLOURS[colour]), total + 1
    assert total > 50
    assert right / total > 0.97


def test_questions_and_statements_are_true() -> None:
    scenes = Scenes(300, 2)
    truths = []
    for index in range(300):
        scene, other = scenes.scene(index), scenes.scene((index + 1) % 300)
        for kind, question, answer in scenes.questions(index):
            if kind == "count":
                assert answer == str(len(scene.objects))
            elif kind == "exists":
                words = question.split()
                assert (answer == "yes") == has(scene, words[-3], words[-2])
            elif kind == "colour":
                shape = question.split()[-2]
                (thing,) = [t for t in scene.objects if SHAPES[t[0]] == shape]
                assert COLOURS[thing[1]] == answer
        statement, true = scenes.pair_statement(index, (index + 1) % 300)
        truths.append(true)
        *_, colour, shape = statement.split()
        if statement.startswith("the left image has more"):
            assert true == (len(scene.objects) > len(other.objects))
        else:
            left, right = has(scene, colour, shape), has(other, colour, shape)
            expected = left if "left" in statement else right if "right" in statement else left or right
            assert true == expected
    assert 0.4 < np.mean(truths) < 0.6


def has(scene: Scene, colour: str, shape: str) -> bool:
    return any(SHAPES[t[0]] == shape and COLOURS[t[1]] == colour for t in scene.objects)


def test_relevance_is_a_function_of_captions_and_scenes() -> None:
    scenes = Scenes(8, 6)
    captions = scenes.captions(2)
    assert relevance(captions, [scenes.scene(2)]).tolist() == [[1.0]] * 4


@pytest.mark.parametrize("size", [48, 96, 144])
def test_any_multiple_of_the_grid(size: int) -> None:
    assert Scenes(1, 0, size).image(0).shape == (size, size, 3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        Scenes(1, 0, 50).image(0)
    with pytest.raises(ValueError, match="choose"):
        Scenes(1, 0, detail="some")
