"""Language about scenes: captions, questions and statements, each with its exact meaning.

A scene is a set of objects on a 3x3 grid. Everything said about one is built from *statements* that can be checked
against any other scene, which is what makes false negatives known here (see `relevance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sacl_ds.data.draws import words

SHAPES = ("circle", "ring", "bar", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the centre",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
BACKGROUNDS = ("dark", "light", "grey", "brown")
RELATIONS = ("to the left of", "to the right of", "above", "below")
MAX_OBJECTS = 4

SHAPE, COLOUR, SIZE, TEXTURE, PLACE = range(5)
UNSAID = -1


@dataclass(frozen=True, slots=True)
class Scene:
    """Content of a picture. An object is (shape, colour, size, texture, place), indices into the tuples above."""

    objects: tuple[tuple[int, int, int, int, int], ...]
    background: int


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence and the statements it makes.

    described: one or two objects as in `Scene`, UNSAID where the sentence is silent.
    relation: index into RELATIONS, of the first described object to the second, or UNSAID.
    background: index into BACKGROUNDS or UNSAID.
    """

    text: str
    described: tuple[tuple[int, ...], ...]
    relation: int = UNSAID
    background: int = UNSAID

    @property
    def statements(self) -> int:
        """Number of statements that the caption makes."""
        said = sum(value != UNSAID for thing in self.described for value in thing)
        return said + (self.relation != UNSAID) + (self.background != UNSAID)


class Draws:
    """Uniform choices from `count` random words that depend on `entropy` alone."""

    def __init__(self, *entropy: int, count: int) -> None:
        self._words = list(words(count, *entropy))

    def below(self, n: int) -> int:
        return self._words.pop() % n

    def sample(self, n: int, k: int) -> list[int]:
        """Draw k different numbers below n, in random order."""
        pool = list(range(n))
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


def draw_scene(draws: Draws) -> Scene:
    count = (2, 2, 3, 3, 4)[draws.below(5)]
    places = draws.sample(len(PLACES), count)
    objects = tuple(
        (
            draws.below(len(SHAPES)),
            draws.below(len(COLOURS)),
            draws.below(len(SIZES)),
            (0, 0, 1, 2)[draws.below(4)],  # plain, striped, dotted: half are plain
            place,
        )
        for place in places
    )
    return Scene(objects, draws.below(len(BACKGROUNDS)))


# What a caption says of an object it names, and how often (out of 16).
_ONE_OBJECT = (
    ((SHAPE, COLOUR), 4),
    ((SHAPE, COLOUR, SIZE), 4),
    ((SHAPE, COLOUR, TEXTURE), 4),
    ((SHAPE, COLOUR, PLACE), 4),
)
_OF_TWO_OBJECTS = (
    ((SHAPE, COLOUR), 14),
    ((SHAPE,), 1),
    ((COLOUR,), 1),
)


def _choose(draws: Draws, table: tuple[tuple[tuple[int, ...], int], ...]) -> tuple[int, ...]:
    number = draws.below(16)
    for attributes, share in table:
        number -= share
        if number < 0:
            return attributes
    raise AssertionError("shares must add up to 16")


def _keep(thing: tuple[int, ...], attributes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value if i in attributes else UNSAID for i, value in enumerate(thing))


def phrase(thing: tuple[int, ...], article: str = "a") -> str:
    """Phrase a described object, e.g. 'a small striped red circle at the top left'."""
    parts = []
    if thing[SIZE] != UNSAID:
        parts.append(SIZES[thing[SIZE]])
    if thing[TEXTURE] != UNSAID:
        parts.append(TEXTURES[thing[TEXTURE]])
    if thing[COLOUR] != UNSAID:
        parts.append(COLOURS[thing[COLOUR]])
    parts.append(SHAPES[thing[SHAPE]] if thing[SHAPE] != UNSAID else "object")
    if article == "a" and parts[0][0] in "aeiou":
        article = "an"
    text = f"{article} {' '.join(parts)}"
    return f"{text} {PLACES[thing[PLACE]]}" if thing[PLACE] != UNSAID else text


def relation_holds(relation: int, first_place: int, second_place: int) -> bool:
    """Return whether an object at `first_place` stands in RELATIONS[relation] to one at `second_place`."""
    (row_a, column_a), (row_b, column_b) = divmod(first_place, 3), divmod(second_place, 3)
    return (column_a < column_b, column_a > column_b, row_a < row_b, row_a > row_b)[relation]


def draw_caption(draws: Draws, scene: Scene, detail: str = "partial") -> Caption:
    """Draw a true caption of `scene`.

    detail: "partial" says something of one or two objects, as web captions do; "simple" names one by colour and shape;
    "detailed" says all of one, or much of two, so that it is true of few other scenes.
    """
    pair = draws.sample(len(scene.objects), 2)
    kind = draws.below(20)
    opening = ("", "", "", "there is ")[draws.below(4)]
    if detail == "simple":
        only = _keep(scene.objects[pair[0]], (SHAPE, COLOUR))
        return Caption(f"{opening}{phrase(only)}", (only,))
    if detail == "detailed":
        return _detailed(draws, scene, pair, opening)
    if kind < 4:
        first, second = (_keep(scene.objects[i], _choose(draws, _OF_TWO_OBJECTS)) for i in pair)
        places = [scene.objects[i][PLACE] for i in pair]
        if draws.below(3) == 0:
            true = [r for r in range(len(RELATIONS)) if relation_holds(r, places[0], places[1])]
            relation = true[draws.below(len(true))]
            return Caption(
                f"{opening}{phrase(first)} {RELATIONS[relation]} {phrase(second)}", (first, second), relation
            )
        joint = (" and ", " with ", " , ")[draws.below(3)]
        return Caption(f"{opening}{phrase(first)}{joint}{phrase(second)}", (first, second))
    only = _keep(scene.objects[pair[0]], _choose(draws, _ONE_OBJECT))
    if kind < 15:
        return Caption(f"{opening}{phrase(only)}", (only,))
    text = f"{opening}{phrase(only)} on a {BACKGROUNDS[scene.background]} background"
    return Caption(text, (only,), background=scene.background)


def _detailed(draws: Draws, scene: Scene, pair: list[int], opening: str) -> Caption:
    if draws.below(2):
        thing = scene.objects[pair[0]]
        if draws.below(2):
            return Caption(f"{opening}{phrase(thing)}", (thing,))
        text = f"{opening}{phrase(thing)} on a {BACKGROUNDS[scene.background]} background"
        return Caption(text, (thing,), background=scene.background)
    more = ((SIZE, TEXTURE), (SIZE,), (TEXTURE,), (PLACE,))
    first, second = (_keep(scene.objects[i], (SHAPE, COLOUR, *more[draws.below(len(more))])) for i in pair)
    joint = (" and ", " with ", " , ")[draws.below(3)]
    return Caption(f"{opening}{phrase(first)}{joint}{phrase(second)}", (first, second))


def draw_captions(draws: Draws, scene: Scene, count: int, detail: str) -> list[Caption]:
    """Draw `count` captions with different wording wherever the scene allows it (a few tries each)."""
    captions: list[Caption] = []
    for _ in range(count):
        caption = draw_caption(draws, scene, detail)
        if caption.text in {other.text for other in captions}:
            caption = draw_caption(draws, scene, detail)
        captions.append(caption)
    return captions


def relevance(captions: Sequence[Caption], scenes: Sequence[Scene]) -> np.ndarray:
    """(captions, scenes) float32: the largest fraction of a caption's statements that hold in a scene.

    Described objects are matched to different objects of the scene so that most statements hold; 1.0 means
    that the caption is true of the scene, whether or not it was written for it.
    """
    things = np.full((len(scenes), MAX_OBJECTS, 5), -2, np.int8)
    for row, scene in enumerate(scenes):
        things[row, : len(scene.objects)] = scene.objects
    backgrounds = np.array([scene.background for scene in scenes])
    described = np.full((len(captions), 2, 5), UNSAID, np.int8)
    for row, caption in enumerate(captions):
        described[row, : len(caption.described)] = caption.described

    first, second = (list(t) for t in zip(*_ordered_pairs(), strict=True))
    rows, columns = np.divmod(things[:, :, PLACE], 3)
    present = things[:, :, PLACE] >= 0
    both = present[:, first] & present[:, second]
    holds = np.stack(  # (relation, scenes, pairs)
        [
            both & (columns[:, first] < columns[:, second]),
            both & (columns[:, first] > columns[:, second]),
            both & (rows[:, first] < rows[:, second]),
            both & (rows[:, first] > rows[:, second]),
        ]
    )
    result = np.empty((len(captions), len(scenes)), np.float32)
    for row, caption in enumerate(captions):
        # an unsaid attribute (-1) equals no attribute of an object (>= 0) and no padding (-2)
        match = (described[row][None, :, None, :] == things[:, None, :, :]).sum(-1)  # (scenes, 2, objects)
        score = match[:, 0, first] + match[:, 1, second]
        if caption.relation != UNSAID:
            score = score + holds[caption.relation]
        best = score.max(1) + (backgrounds == caption.background)
        result[row] = best / caption.statements
    return result


def _ordered_pairs() -> list[tuple[int, int]]:
    return [(a, b) for a in range(MAX_OBJECTS) for b in range(MAX_OBJECTS) if a != b]


def draw_questions(draws: Draws, scene: Scene) -> list[tuple[str, str, str]]:
    """Draw (type, question, answer) triples; each question has one right answer in this scene."""
    asked: list[tuple[str, str, str]] = [("count", "how many objects are there ?", str(len(scene.objects)))]
    asked.append(("background", "what colour is the background ?", BACKGROUNDS[scene.background]))
    for thing in scene.objects:
        if sum(other[SHAPE] == thing[SHAPE] for other in scene.objects) == 1:
            noun = SHAPES[thing[SHAPE]]
            asked.append(("colour", f"what colour is the {noun} ?", COLOURS[thing[COLOUR]]))
            asked.append(("texture", f"what texture has the {noun} ?", TEXTURES[thing[TEXTURE]]))
            asked.append(("place", f"where is the {noun} ?", PLACES[thing[PLACE]].split("the ")[1]))
        if sum(other[COLOUR] == thing[COLOUR] for other in scene.objects) == 1:
            asked.append(("shape", f"what shape is the {COLOURS[thing[COLOUR]]} object ?", SHAPES[thing[SHAPE]]))
    pair = _present_or_absent(draws, scene)
    asked.append(("exists", f"is there {phrase(pair[0])} ?", "yes" if pair[1] else "no"))
    return asked


def _present_or_absent(draws: Draws, scene: Scene) -> tuple[tuple[int, ...], bool]:
    """Draw a colour-and-shape description that is true of the scene half of the time."""
    present = {(thing[SHAPE], thing[COLOUR]) for thing in scene.objects}
    if draws.below(2):
        shape, colour = sorted(present)[draws.below(len(present))]
    else:
        absent = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS)) if (s, c) not in present]
        shape, colour = absent[draws.below(len(absent))]
    return (shape, colour, UNSAID, UNSAID, UNSAID), (shape, colour) in present


def draw_pair_statement(draws: Draws, left: Scene, right: Scene) -> tuple[str, bool]:
    """Draw a statement about two images and its truth; true and false are about equally frequent."""

    def has(scene: Scene, shape: int, colour: int) -> bool:
        return any(thing[SHAPE] == shape and thing[COLOUR] == colour for thing in scene.objects)

    wanted = bool(draws.below(2))
    for _ in range(8):
        kind = draws.below(4)
        source = left if draws.below(2) else right
        thing, _ = _present_or_absent(draws, source)
        in_left, in_right = (has(scene, thing[SHAPE], thing[COLOUR]) for scene in (left, right))
        if kind == 0:
            statement = f"the left image has {phrase(thing)}", in_left
        elif kind == 1:
            statement = f"the right image has {phrase(thing)}", in_right
        elif kind == 2:
            statement = f"at least one image has {phrase(thing)}", in_left or in_right
        else:
            more = len(left.objects) > len(right.objects)
            statement = "the left image has more objects than the right image", more
        if statement[1] == wanted:
            break
    return statement
