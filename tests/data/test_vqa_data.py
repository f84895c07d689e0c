"""VQA v2 and Visual Genome files, scenes' questions, answer lists, and batches of questions."""

import copy
import io
import json
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.order import Place
from sacl_ds.data.sample import BadSample
from sacl_ds.data.scene_language import COLOURS
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView, TrainView
from sacl_ds.errors import UserError
from sacl_ds.tasks.examples import ExampleSource, ImageFile, example_order
from sacl_ds.tasks.vqa.batch import QuestionBatch, QuestionCollator
from sacl_ds.tasks.vqa.data import (
    Question,
    SceneQuestions,
    answer_list,
    answer_weights,
    scene_questions,
    visual_genome_questions,
    vqa_questions,
    with_words,
)

QUESTIONS = {
    "info": {"version": "2.0"},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "What color is the dog?", "question_id": 42000},
        {"image_id": 42, "question": "Is it a dog?", "question_id": 42001},
        {"image_id": 73, "question": "How many?", "question_id": 73000},
    ],
}


def labels(question_id: int, image_id: int, kind: str, answer_type: str, *answers: str) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "image_id": image_id,
        "question_type": kind,
        "answer_type": answer_type,
        "multiple_choice_answer": answers[0],
        "answers": [{"answer": each, "answer_id": n, "answer_confidence": "yes"} for n, each in enumerate(answers, 1)],
    }


ANNOTATIONS = {
    "annotations": [  # in another order than the questions
        labels(73000, 73, "how many", "number", *["2"] * 8, "two", "3"),
        labels(42001, 42, "is it", "yes/no", *["yes"] * 10),
        labels(42000, 42, "what color is the", "other", *["brown"] * 5, *["Brown."] * 3, *["tan"] * 2),
    ]
}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def jpeg(path: Path, colour: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG")
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def test_official_files(tmp_path: Path) -> None:
    asked = vqa_questions(
        written(tmp_path / "q.json", QUESTIONS), written(tmp_path / "a.json", ANNOTATIONS), tmp_path / "images"
    )
    assert [each.question_id for each in asked] == [42000, 42001, 73000]
    assert [each.question for each in asked] == ["What color is the dog?", "Is it a dog?", "How many?"]
    assert [each.kind for each in asked] == ["what color is the", "is it", "how many"]
    assert [each.answer_type for each in asked] == ["other", "yes/no", "number"]
    assert asked[0].answers == ["brown"] * 5 + ["Brown."] * 3 + ["tan"] * 2
    assert len({each.key for each in asked}) == 3
    unlabelled = vqa_questions(tmp_path / "q.json", None, tmp_path)
    assert [each.answers for each in unlabelled] == [[], [], []]
    assert [each.kind + each.answer_type for each in unlabelled] == ["", "", ""]
    assert [each.question_id for each in unlabelled] == [42000, 42001, 73000]


@pytest.mark.parametrize(
    ("subset", "name"),
    [
        ("val2014", "COCO_val2014_000000000042.jpg"),
        ("val2014", "val2014/COCO_val2014_000000000042.jpg"),
        ("test-dev2015", "test2015/COCO_test2015_000000000042.jpg"),
        ("val2014", "000000000042.jpg"),
        ("val2014", "val2014/000000000042.jpg"),
        ("val2014", "42.jpg"),
        ("val2014", "42.png"),
        ("", "42.png"),
    ],
)
def test_where_images_lie(subset: str, name: str, tmp_path: Path) -> None:
    questions = written(tmp_path / "q.json", QUESTIONS | {"data_subtype": subset})
    asked = vqa_questions(questions, None, tmp_path / "images")
    with pytest.raises(BadSample, match=r"^image 42: no file .*42\.png$"):
        asked[0].image.picture()
    jpeg(tmp_path / "images" / name)
    assert asked[0].image.picture().size == (32, 32)
    assert asked[1].image.picture().size == (32, 32)
    with pytest.raises(BadSample, match="image 73"):
        asked[2].image.picture()


def changed(content: dict[str, Any], *path: Any, to: Any = None) -> dict[str, Any]:
    """A deep copy in which what stands at `path` is `to`, or is gone."""
    content = copy.deepcopy(content)
    inner: Any = content
    for each in path[:-1]:
        inner = inner[each]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return content


Q, A = QUESTIONS, ANNOTATIONS
FAULTY = {
    "q.json: no list 'questions' in it; give an official questions file of VQA v2": ([], A),
    "q.json: no list 'questions'": (changed(Q, "questions"), A),
    "q.json line 1: not valid JSON": ("{", A),
    "q.json: data_subtype is not a text": (changed(Q, "data_subtype", to=3), A),
    "q.json questions[1]: 'question' is missing": (changed(Q, "questions", 1, "question"), A),
    "q.json questions[2]: not as expected: '73' where a whole number belongs": (
        changed(Q, "questions", 2, "image_id", to="73"),
        A,
    ),
    "q.json questions[0]: not as expected: True where a whole number": (
        changed(Q, "questions", 0, "question_id", to=True),
        A,
    ),
    "q.json questions[0]: not as expected: 7 where a text belongs": (changed(Q, "questions", 0, "question", to=7), A),
    "q.json questions[1]: not as expected: text is not valid Unicode": (
        changed(Q, "questions", 1, "question", to="a smile \ud83d"),
        A,
    ),
    "q.json questions[1]: not as expected": (changed(Q, "questions", 1, to="text"), A),
    "q.json questions[2]: the id 42001 stands at [1] already": (
        changed(Q, "questions", 2, "question_id", to=42001),
        A,
    ),
    "a.json: no list 'annotations'": (Q, Q),
    "a.json annotations[0]: 'answers' is missing": (Q, changed(A, "annotations", 0, "answers")),
    "a.json annotations[0]: not as expected: 'yes' where a list": (
        Q,
        changed(A, "annotations", 0, "answers", to="yes"),
    ),
    "a.json annotations[2]: 'answer' is missing": (Q, changed(A, "annotations", 2, "answers", 4, "answer")),
    "a.json annotations[2]: not as expected: 4 where a text": (
        Q,
        changed(A, "annotations", 2, "answers", 4, "answer", to=4),
    ),
    "a.json annotations[2]: the id 42001 stands at [1] already": (
        Q,
        changed(A, "annotations", 2, "question_id", to=42001),
    ),
    "a.json: no labels for question_id 42001 (": (Q, changed(A, "annotations", 1)),
    "a.json: no answers in the labels of question_id 73000 (": (Q, changed(A, "annotations", 0, "answers", to=[])),
    "is about image 73, its labels about image 74; give the annotations of the same split": (
        Q,
        changed(A, "annotations", 0, "image_id", to=74),
    ),
}


@pytest.mark.parametrize("line", FAULTY)
def test_faulty_files(line: str, tmp_path: Path) -> None:
    questions, annotations = FAULTY[line]
    files = written(tmp_path / "q.json", questions), written(tmp_path / "a.json", annotations)
    with pytest.raises(UserError) as raised:
        vqa_questions(*files, tmp_path)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


GENOME = [
    {"id": 5, "qas": [{"image_id": 5, "qa_id": 9, "question": "What is it?", "answer": "A Dog."}]},
    {"id": 6, "qas": []},
    {
        "id": 7,
        "qas": [
            {"image_id": 7, "qa_id": 11, "question": "Where?", "answer": "Outside."},
            {"image_id": 7, "qa_id": 12, "question": "Who?", "answer": "Two men."},
        ],
    },
]


def test_visual_genome(tmp_path: Path) -> None:
    asked = visual_genome_questions(written(tmp_path / "qa.json", GENOME), tmp_path)
    assert [each.question_id for each in asked] == [9, 11, 12]
    assert [answer_weights(each) for each in asked] == [{"dog": 0.5}, {"outside": 0.5}, {"2 men": 0.5}]
    for name, number in (("VG_100K/5.jpg", 0), ("VG_100K_2/7.jpg", 1), ("7.jpg", 2)):
        jpeg(tmp_path / name)
        assert asked[number].image.picture().size == (32, 32)
    # images of the two data sets have nothing to do with each other
    coco = vqa_questions(written(tmp_path / "q.json", changed(Q, "questions", 0, "image_id", to=5)), None, tmp_path)
    assert not {each.key for each in coco} & {each.key for each in asked}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({}, "qa.json: not a list of images; give Visual Genome's question_answers.json"),
        ([GENOME[0], {"id": 1}], "qa.json [1]: 'qas' is missing"),
        ([changed(GENOME[0], "qas", to="x")], "qa.json [0]: not as expected: 'x' where a list"),
        ([*GENOME[:2], changed(GENOME[2], "qas", 1, "answer")], "qa.json [2].qas[1]: 'answer' is missing"),
        ([changed(GENOME[0], "qas", 0, "qa_id", to="9")], "qa.json [0].qas[0]: not as expected: '9' where a whole"),
        ([GENOME[0], changed(GENOME[2], "qas", 1, "qa_id", to=9)], "qa.json, question[2]: the id 9 stands at [0]"),
    ],
)
def test_faulty_visual_genome(content: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        visual_genome_questions(written(tmp_path / "qa.json", content), tmp_path)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def asked(*answers: str, chosen: str = "", weight: float = 1.0, question_id: int = 1) -> Question:
    return Question(ImageFile("image 1", ()), "what ?", question_id, list(answers), chosen=chosen, weight=weight)


def test_answer_list() -> None:
    questions = [
        asked("red", "red", "blue"),
        asked("Red.", "blue", "the red"),  # normalised before they are counted
        asked("blue", "red", chosen="blue"),  # the official one, not the most frequent
        asked("blue", "blue"),
        asked("zebra", "ant"),  # a tie
        asked("none", "none"),
        asked("A", "A", "b"),  # nothing is left of it but itself
        asked(),
    ]
    assert answer_list(questions, 1) == ["blue", "red", "0", "a", "ant"]
    assert answer_list(questions, 2) == ["blue", "red"]
    assert answer_list(questions, 3) == []
    assert answer_list(reversed(questions), 1) == answer_list(questions, 1)


@given(st.lists(st.sampled_from(["red", "Red", "two", "2", "dog", "a dog", "the"]), min_size=1, max_size=10))
def test_answer_weights(answers: list[str]) -> None:
    weights = answer_weights(asked(*answers, weight=0.5))
    assert sum(weights.values()) == pytest.approx(0.5)
    same = {"red": "red", "Red": "red", "two": "2", "2": "2", "dog": "dog", "a dog": "dog", "the": "the"}
    counted = Counter(same[each] for each in answers)
    assert weights == pytest.approx({each: 0.5 * count / len(answers) for each, count in counted.items()})
    assert answer_weights(asked()) == {}


def test_scenes() -> None:
    scenes = Scenes(12, seed=3)
    every = scene_questions(scenes)
    assert len({each.question_id for each in every}) == len(every) == sum(len(scenes.questions(i)) for i in range(12))
    assert {each.kind for each in every} >= {"count", "background", "colour", "place", "exists"}
    for each in every:
        assert set(each.answers) == {each.answers[0]}
        assert len(each.answers) == 10
        right = {"count": "number", "exists": "yes/no"}.get(each.kind, "other")
        assert each.answer_type == right
        if each.kind == "colour":
            assert each.answers[0] in COLOURS
        assert answer_weights(each) == {each.answers[0]: 1.0}  # its spelling is the normalised one
    by_id = {each.question_id: each for each in every}
    training = SceneQuestions(scenes)
    assert len(training) == 12
    for index, each in enumerate(training):
        assert by_id[each.question_id] == each
        assert torch.equal(each.image.picture().pixels(), torch.from_numpy(scenes.image(index)).permute(2, 0, 1))
    assert pickle.loads(pickle.dumps(training))[7].question == training[7].question
    assert [each.key for each in training[2:4]] == [training[2].key, training[3].key]
    with pytest.raises(IndexError):
        training[12]


def test_scenes_for_training_ask_everything() -> None:
    training = SceneQuestions(Scenes(10**6, seed=3))
    kinds = Counter(training[index].kind for index in range(600))
    asked_of = [len(training.scenes.questions(index)) for index in range(600)]
    expected = sum(1 / count for count in asked_of)  # each scene has one question of how many objects there are
    for kind in ("count", "background", "exists"):
        assert abs(kinds[kind] - expected) < 4 * expected**0.5


SENTENCES = ["what colour is the dog ?", "red blue yes no", "a dog", "how many dogs"]


def tokenizer() -> Tokenizer:
    return Tokenizer(train_wordpiece(SENTENCES * 5, 200), 16)


def test_words_that_no_caption_had(tmp_path: Path) -> None:
    known = tokenizer()
    assert known.ids(["α"]) == known.ids(["β"])  # unknown, both
    grown = with_words(known, ["β dogs", "α", "ЖУК?", "red", "4"])
    assert grown.size == known.size + 3
    rows = grown.ids(["α", "β", "жук", *SENTENCES])
    assert [row[1] for row in rows[:3]] == [known.size, known.size + 1, known.size + 2]
    assert [len(row) for row in rows[:3]] == [3, 3, 3]
    assert rows[3:] == known.ids(SENTENCES)
    assert with_words(known, ["red", "α", "жук ?", "β"]).fingerprint == grown.fingerprint
    assert with_words(known, SENTENCES) is known
    assert with_words(grown, ["α"]) is grown
    grown.save(tmp_path)
    assert Tokenizer.load(tmp_path, 16).ids(["α β жук ?"]) == grown.ids(["α β жук ?"])
    assert known.ids(["α"]) == known.ids(["β"])  # untouched


def question_files(folder: Path) -> list[Question]:
    for number, colour in enumerate(("red", "green", "blue", "white")):
        jpeg(folder / f"{number}.png", colour)
    said = [("red", "red", "dog"), ("no",), ("a dog", "blue", "yes", "no"), ("blue",)]
    texts = ["what colour ?", "is the dog left of it ?", "what colour is the dog ?", "what is what ?"]
    return [
        Question(ImageFile(f"image {n}", (folder / f"{n}.png",)), text, n, list(given))
        for n, (text, given) in enumerate(zip(texts, said, strict=True))
    ]


def test_batch(tmp_path: Path) -> None:
    questions, words = question_files(tmp_path), tokenizer()
    seen: list[str] = []

    def view(text: str) -> CanonicalView:
        seen.append(text)
        return CanonicalView(16)

    collator = QuestionCollator(words, view, seed=0)
    batch = collator([collator.item(each, Place(0, 0, n)) for n, each in enumerate(questions)])
    assert seen[0] == "what colour ? red dog"
    assert seen[2] == "what colour is the dog ? dog blue yes no"
    assert len(batch) == 4
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert (batch.images[0, :, 3, 3] - torch.tensor([255, 0, 0])).abs().max() == 0
    assert batch.answer_question.tolist() == [0, 0, 1, 2, 2, 2, 2, 3]
    assert batch.answer_weight.tolist() == pytest.approx([2 / 3, 1 / 3, 1, 0.25, 0.25, 0.25, 0.25, 1])
    answers = ["red", "dog", "no", "dog", "blue", "yes", "no", "blue"]
    assert rows(batch.answer_ids, batch.answer_mask) == words.ids(answers)
    assert rows(batch.input_ids, batch.attention_mask) == words.ids([each.question for each in questions])
    assert batch.pair_ids.shape == (4, 1)
    assert len(batch.pair_ids.unique()) == 4
    assert_equal(batch.to(torch.device("cpu")), batch)


def rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    assert (ids[mask == 0] == 0).all()
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def assert_equal(one: QuestionBatch, other: QuestionBatch) -> None:
    for name, value in vars(one).items():
        same = (
            torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        )
        assert same, name


def test_join_is_one_batch_of_all(tmp_path: Path) -> None:
    questions, words = question_files(tmp_path), tokenizer()
    collator = QuestionCollator(words, lambda text: TrainView(16, (0.5, 1.0), True), seed=4)
    items = [collator.item(each, Place(1, 0, n)) for n, each in enumerate(questions)]
    for cuts in ((1, 2), (2, 2), (1, 4), (3, 3)):
        parts = [collator(items[a:b]) for a, b in pairwise([0, *cuts, 4]) if a < b]
        assert_equal(collator.join(parts), collator(items))


def test_what_is_random_depends_on_seed_epoch_and_key(tmp_path: Path) -> None:
    questions = question_files(tmp_path)
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "0.png")
    Image.fromarray(noise.numpy()).save(tmp_path / "1.png")

    def image(number: int, epoch: int, seed: int, offset: int = 0) -> torch.Tensor:
        collator = QuestionCollator(tokenizer(), lambda text: TrainView(16, (0.3, 0.9), True), seed)
        return collator.item(questions[number], Place(epoch, 0, offset)).image

    assert torch.equal(image(0, 1, 2), image(0, 1, 2, offset=3))
    assert not torch.equal(image(0, 1, 2), image(0, 2, 2))
    assert not torch.equal(image(0, 1, 2), image(0, 1, 3))
    assert not torch.equal(image(0, 1, 2), image(1, 1, 2))


def test_bad_questions(tmp_path: Path) -> None:
    collator = QuestionCollator(tokenizer(), lambda text: CanonicalView(16), seed=0)
    missing, text, unlabelled, cut = question_files(tmp_path)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no picture")
    unlabelled.answers.clear()
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "3.png", "JPEG")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:1500])
    for question, line in (
        (missing, "image 0: no file "),
        (text, f"image 1: {tmp_path}/1.png cannot be read: not an image"),
        (unlabelled, "image 2, question 2: no answers to train on"),
        (cut, "image 3, question 3: the image cannot be decoded: "),
    ):
        with pytest.raises(BadSample) as raised:
            collator.item(question, Place(0, 0, 0))
        assert str(raised.value).startswith(line)


@pytest.mark.parametrize("workers", [0, 2])
def test_through_the_loader(workers: int) -> None:
    source = ExampleSource(SceneQuestions(Scenes(20, seed=1)))
    order = example_order(source, 6, seed=0)
    collator = QuestionCollator(tokenizer(), lambda text: CanonicalView(48), seed=0)

    def batches(rank: int, world: int, count: int) -> list[QuestionBatch]:
        loader = BatchLoader(source, order, collator, rank=rank, world=world, workers=workers)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]

    whole = batches(0, 1, 4)
    assert len({key for batch in whole[:3] for key in batch.keys}) == 18
    for batch, left, right in zip(whole, batches(0, 2, 4), batches(1, 2, 4), strict=True):
        assert_equal(collator.join([left, right]), batch)
        for row in range(6):
            assert batch.answer_weight[batch.answer_question == row].sum() == pytest.approx(1)
