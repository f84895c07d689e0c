"""NLVR2's files, statements about scenes, and batches of either."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_ds.data.loader import BatchLoader
from sacl_ds.data.order import Place
from sacl_ds.data.sample import BadSample
from sacl_ds.data.scene_language import COLOUR, COLOURS, SHAPE, SHAPES, Scene
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import UserError
from sacl_ds.tasks.examples import ExampleSource, example_order
from sacl_ds.tasks.nlvr2.data import (
    SceneStatements,
    Statement,
    StatementBatch,
    StatementCollator,
    nlvr2_statements,
    scene_statements,
)
from sacl_ds.tasks.task import FinetuneView

SAID = "the left image has a dog and the right image has two cats"


def written(folder: Path, *entries: object) -> Path:
    path = folder / "dev.json"
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def entry(identifier: str = "dev-850-0-1", **more: object) -> dict[str, object]:
    return {"identifier": identifier, "sentence": SAID, "label": "True", "synset": "dog", **more}


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 12, 3), value, np.uint8)).save(path)


def shade(statement: Statement, side: str) -> int:
    return int(getattr(statement, side).picture().pixels()[0, 0, 0])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_wordpiece([SAID, *(s.sentence for s in SceneStatements(Scenes(400, 1)))], 200), 20)


def test_an_official_file(tmp_path: Path) -> None:
    lines = [
        entry("dev-850-0-1"),
        entry("dev-850-3-1", label="False"),
        entry("test1-7-2-0", label=None),
        entry("train-10171-1-0", directory=33),
        entry("train-10172-1-0", directory="34"),
    ]
    del lines[2]["label"]
    for number, name in enumerate(
        ["dev-850-0", "dev/dev-850-3", "test1/test1-7-2", "train/33/train-10171-1", "34/train-10172-1"]
    ):
        save(tmp_path / f"{name}-img0.png", 2 * number)
        save(tmp_path / f"{name}-img1.png", 2 * number + 1)
    statements = nlvr2_statements(written(tmp_path, *lines, ""), tmp_path)
    assert [statement.identifier for statement in statements] == [line["identifier"] for line in lines]
    assert [statement.label for statement in statements] == [True, False, None, True, True]
    assert {statement.sentence for statement in statements} == {SAID}
    for number, statement in enumerate(statements):
        assert (shade(statement, "left"), shade(statement, "right")) == (2 * number, 2 * number + 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "dev.json line 2: not valid JSON"),
        ({"sentence": "a", "label": "True"}, r"dev.json line 2: 'identifier' is missing"),
        ({"identifier": "dev-1-0-0", "label": "True"}, r"dev.json line 2: 'sentence' is missing"),
        (entry(sentence=" "), "line 2.*sentence ' ' is no text"),
        (entry(sentence="a smile \ud83d"), "line 2: not as expected: text is not valid Unicode"),
        (entry(sentence=None), "line 2.*sentence None is no text"),
        (entry(label="maybe"), "line 2.*label 'maybe' is neither True nor False"),
        (entry(label=1), "line 2.*label 1 is neither True nor False"),
        (entry("dev-850-0"), "line 2.*'dev-850-0' is not split-set-pair-sentence"),
        (entry("dev-850-0-1-2"), "line 2.*is not split-set-pair-sentence"),
        (entry("dev-850-a-1"), "line 2.*is not split-set-pair-sentence"),
        (entry("../dev-850-0-1"), "line 2.*is not split-set-pair-sentence"),
        (entry(850), "dev.json line 2: not as expected"),  # type: ignore[arg-type]
        ([], "dev.json line 2: not as expected"),
        (entry("dev-1-0-0"), "line 2.*dev-1-0-0 stands in line 1 already; leave one"),
    ],
)
def test_malformed_lines(line: object, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, entry("dev-1-0-0"), line, entry("dev-2-0-0"))
    with pytest.raises(UserError, match=said) as error:
        nlvr2_statements(path, tmp_path)
    assert "\n" not in str(error.value)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no statements"):
        nlvr2_statements(written(tmp_path, "", ""), tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        nlvr2_statements(tmp_path / "none.json", tmp_path)


def test_missing_and_damaged_images(tmp_path: Path, tokenizer: Tokenizer) -> None:
    collator = StatementCollator(tokenizer, lambda text: CanonicalView(8), 0)
    (statement,) = nlvr2_statements(written(tmp_path, entry(directory=3)), tmp_path)
    save(tmp_path / "dev-850-0-img0.png", 1)
    with pytest.raises(BadSample, match=r"image dev-850-0-img1: no file .*dev/3/dev-850-0-img1\.png or"):
        collator.item(statement, Place(0, 0, 0))
    (tmp_path / "dev-850-0-img1.png").write_bytes(b"no image")
    with pytest.raises(BadSample, match=r"dev-850-0-img1\.png cannot be read"):
        collator.item(statement, Place(0, 0, 0))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    # many official .png are JPEGs
    Image.fromarray(noise).save(tmp_path / "dev-850-0-img1.png", format="JPEG")
    assert collator.item(statement, Place(0, 0, 0)).right.shape == (3, 8, 8)
    whole = (tmp_path / "dev-850-0-img1.png").read_bytes()
    (tmp_path / "dev-850-0-img1.png").write_bytes(whole[: len(whole) // 2])  # its header is in order
    with pytest.raises(BadSample, match=r"dev-850-0-1: an image cannot be decoded"):
        collator.item(statement, Place(0, 0, 0))


def test_nothing_to_learn_without_a_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (statement,) = nlvr2_statements(written(tmp_path, entry(label=None)), tmp_path)
    with pytest.raises(BadSample, match="dev-850-0-1: it has no label"):
        StatementCollator(tokenizer, lambda text: CanonicalView(8), 0).item(statement, Place(0, 0, 0))


def holds(sentence: str, left: Scene, right: Scene) -> bool:
    """Whether it is true, read off the words."""
    words = sentence.split()
    if "more" in words:
        return len(left.objects) > len(right.objects)
    shape, colour = SHAPES.index(words[-1]), COLOURS.index(words[-2])
    found = [any((o[SHAPE], o[COLOUR]) == (shape, colour) for o in scene.objects) for scene in (left, right)]
    return {"the left": found[0], "the right": found[1], "at least": any(found)}[" ".join(words[:2])]


def test_statements_about_scenes() -> None:
    scenes = Scenes(2001, 3)
    statements = SceneStatements(scenes)
    assert len(statements) == 1000
    for number, statement in enumerate(statements):
        left, right = (scenes.scene(2 * number + side) for side in (0, 1))
        assert statement.label == holds(statement.sentence, left, right)
    assert 400 < sum(bool(statement.label) for statement in statements) < 600
    assert len({statement.identifier for statement in statements}) == 1000
    pixels = torch.from_numpy(scenes.image(6)), torch.from_numpy(scenes.image(7))
    for side, expected in zip((statements[3].left, statements[3].right), pixels, strict=True):
        assert torch.equal(side.picture().pixels(), expected.permute(2, 0, 1))
    with pytest.raises(IndexError):
        statements[1000]
    with pytest.raises(ValueError, match="two scenes"):
        SceneStatements(Scenes(1, 1))


def test_what_says_the_same_is_a_group() -> None:
    scenes = Scenes(600, 3)
    grouped = scene_statements(scenes)
    for statement, single in zip(grouped, SceneStatements(scenes), strict=True):
        assert (statement.sentence, statement.label, statement.left) == (single.sentence, single.label, single.left)
    groups = defaultdict(list)
    for statement in grouped:
        split, group, pair, sentence = statement.identifier.split("-")
        assert (split, sentence) == ("scenes", "0")
        groups[group].append((int(pair), statement.sentence))
    for members in groups.values():
        assert [pair for pair, _ in members] == list(range(len(members)))
        assert len(members) <= 4
        assert len({sentence for _, sentence in members}) == 1
    said = Counter(statement.sentence for statement in grouped)
    expected = Counter(size for count in said.values() for size in [4] * (count // 4) + [count % 4] * (count % 4 > 0))
    assert Counter(len(members) for members in groups.values()) == expected
    assert expected[4] > 10


def loaded(tokenizer: Tokenizer, rank: int, world: int, workers: int = 0, start: int = 0) -> list[StatementBatch]:
    source = ExampleSource(SceneStatements(Scenes(60, 1)))
    collator = StatementCollator(tokenizer, FinetuneView(32, (0.5, 1.0), True).for_text, 4)
    loader = BatchLoader(
        source, example_order(source, 12, 4), collator, rank=rank, world=world, workers=workers, start_step=start
    )
    return [batch for batch, _ in zip(loader, range(4), strict=False)]


def same(batch: StatementBatch, other: StatementBatch) -> bool:
    names = ("left", "right", "input_ids", "attention_mask", "labels", "pair_ids")
    return batch.keys == other.keys and all(torch.equal(getattr(batch, n), getattr(other, n)) for n in names)


def test_batches_are_the_same_on_any_ranks_and_workers(tokenizer: Tokenizer) -> None:
    whole = loaded(tokenizer, 0, 1)
    for batch in whole:
        assert len(batch) == 12
        assert batch.left.shape == batch.right.shape == (12, 3, 32, 32)
        assert batch.left.dtype == batch.right.dtype == torch.uint8
        assert batch.labels.shape == (12,)
        assert batch.labels.dtype == batch.pair_ids.dtype == batch.input_ids.dtype == torch.int64
        assert batch.pair_ids.shape == (12, 1)
    assert all(map(same, whole, loaded(tokenizer, 0, 1, workers=2)))
    assert all(map(same, whole[2:], loaded(tokenizer, 0, 1, start=2)))
    collator = StatementCollator(tokenizer, lambda text: CanonicalView(32), 4)
    joined = [collator.join(parts) for parts in zip(*(loaded(tokenizer, rank, 3) for rank in range(3)), strict=True)]
    assert all(map(same, whole, joined))


def test_a_batch_holds_its_statements(tokenizer: Tokenizer) -> None:
    statements = SceneStatements(Scenes(60, 1))
    by_name = {statement.identifier: statement for statement in statements}
    ids = {}
    for batch in loaded(tokenizer, 0, 1):
        for row, key in enumerate(batch.keys):
            statement = by_name[key]
            length = int(batch.attention_mask[row].sum())
            assert batch.input_ids[row, :length].tolist() == tokenizer.ids([statement.sentence])[0]
            assert (batch.input_ids[row, length:] == tokenizer.pad_id).all()
            assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
            assert batch.labels[row] == statement.label
            assert ids.setdefault(key, int(batch.pair_ids[row])) == int(batch.pair_ids[row])
    assert len(set(ids.values())) == len(ids) == 30


def test_draws_differ_by_side_epoch_and_seed(tokenizer: Tokenizer) -> None:
    statement = SceneStatements(Scenes(20, 1))[4]
    twice = Statement("scenes-0-0-0", statement.sentence, True, statement.left, statement.left)

    def seen(seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        view = FinetuneView(32, (0.3, 1.0), True)
        item = StatementCollator(tokenizer, view.for_text, seed).item(twice, Place(epoch, 0, 0))
        return item.left, item.right

    first = seen(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, seen(0, 0), strict=True))
    assert not torch.equal(*first)
    assert not torch.equal(first[0], seen(0, 1)[0])
    assert not torch.equal(first[0], seen(1, 0)[0])


def test_the_sentence_decides_the_view(tokenizer: Tokenizer) -> None:
    asked = []

    def view(text: str) -> CanonicalView:
        asked.append(text)
        return CanonicalView(24 if "left" in text else 16)

    collator = StatementCollator(tokenizer, view, 0)
    for statement in SceneStatements(Scenes(40, 1)):
        item = collator.item(statement, Place(0, 0, 0))
        assert item.left.shape[2] == item.right.shape[2] == (24 if "left" in statement.sentence else 16)
    assert asked == [statement.sentence for statement in SceneStatements(Scenes(40, 1))]


def test_to_a_device(tokenizer: Tokenizer) -> None:
    (batch, *_) = loaded(tokenizer, 0, 1)
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(value.is_meta for value in tensors)
    assert moved.keys == batch.keys
