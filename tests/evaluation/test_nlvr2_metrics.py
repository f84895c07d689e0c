"""NLVR2's accuracy and consistency, and a model's figures and predictions in one process."""

import copy
import random
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import SharedError, UserError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.nlvr2.data import SceneStatements, Statement, scene_statements
from sacl_ds.tasks.nlvr2.model import Nlvr2Model
from sacl_ds.tasks.nlvr2.task import (
    Nlvr2Result,
    accuracy_and_consistency,
    chance_consistency,
    evaluate_statements,
    group_of,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("judged", "accuracy", "consistency", "chance"),
    [
        # identifier: whether it is judged right
        ({"dev-1-0-0": True}, 1, 1, 1 / 2),
        ({"dev-1-0-0": False}, 0, 0, 1 / 2),
        ({"dev-1-0-0": True, "dev-1-1-0": True}, 1, 1, 1 / 4),
        ({"dev-1-0-0": True, "dev-1-1-0": False}, 1 / 2, 0, 1 / 4),
        ({"dev-1-0-0": True, "dev-1-1-0": True, "dev-1-3-0": False}, 2 / 3, 0, 1 / 8),
        ({"dev-1-0-0": True, "dev-1-1-0": True, "dev-1-2-0": True, "dev-1-3-0": True}, 1, 1, 1 / 16),
        ({"dev-1-0-0": True, "dev-1-1-0": True, "dev-1-2-0": True, "dev-1-3-0": False}, 3 / 4, 0, 1 / 16),
        # another sentence about the same set is another group
        ({"dev-1-0-0": True, "dev-1-0-1": False}, 1 / 2, 1 / 2, 1 / 2),
        # and so is the same number of another split, or another set
        ({"dev-1-0-0": True, "test1-1-0-0": False}, 1 / 2, 1 / 2, 1 / 2),
        ({"dev-1-0-0": True, "dev-11-0-0": False}, 1 / 2, 1 / 2, 1 / 2),
        ({"dev-1-0-0": True, "dev-1-1-0": True, "dev-2-0-0": False}, 2 / 3, 1 / 2, (1 / 4 + 1 / 2) / 2),
    ],
)
def test_cases(judged: dict[str, bool], accuracy: float, consistency: float, chance: float) -> None:
    for truth in (True, False):
        labels = [truth] * len(judged)
        verdicts = [truth == right for right in judged.values()]
        assert accuracy_and_consistency(list(judged), labels, verdicts) == pytest.approx((accuracy, consistency))
    assert chance_consistency(list(judged)) == pytest.approx(chance)


def test_group_of() -> None:
    assert group_of("dev-850-3-1") == group_of("dev-850-0-1") != group_of("dev-850-3-0")


@pytest.mark.parametrize(("labels", "verdicts"), [([], []), ([True], []), ([True, False], [True, False])])
def test_lists_that_do_not_fit(labels: list[bool], verdicts: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"need a label|argument 2"):
        accuracy_and_consistency(["dev-1-0-0"] if labels else [], labels, verdicts)


NAMES = [
    f"{split}-{number}-{pair}-{sentence}"
    for split in ("dev", "test1")
    for number in range(3)
    for pair in range(4)
    for sentence in range(2)
]


@given(st.dictionaries(st.sampled_from(NAMES), st.tuples(st.booleans(), st.booleans()), min_size=1), st.randoms())
def test_against_slow_counting(judged: dict[str, tuple[bool, bool]], order: random.Random) -> None:
    """Sentence by sentence, each pair of it looked up; the order of the list does not matter."""
    sentences = consistent = right = 0
    for split in ("dev", "test1"):
        for number in range(3):
            for sentence in range(2):
                pairs = [f"{split}-{number}-{pair}-{sentence}" for pair in range(4)]
                there = [judged[name][0] == judged[name][1] for name in pairs if name in judged]
                right += sum(there)
                sentences += bool(there)
                consistent += bool(there) and all(there)
    rows = [(name, *both) for name, both in judged.items()]
    order.shuffle(rows)
    names, labels, verdicts = zip(*rows, strict=True)
    accuracy, consistency = accuracy_and_consistency(names, labels, verdicts)
    assert accuracy == pytest.approx(right / len(judged))
    assert consistency == pytest.approx(consistent / sentences)
    assert consistency <= 1 - (1 - accuracy) * len(judged) / (4 * sentences) + 1e-9


def test_chance_is_what_guessing_gives() -> None:
    names = NAMES[:9] + NAMES[30:35]
    rng = random.Random(0)
    labels = [rng.random() < 0.3 for _ in names]
    tries = 20_000
    total = 0.0
    for _ in range(tries):
        total += accuracy_and_consistency(names, labels, [rng.random() < 0.5 for _ in names])[1]
    assert total / tries == pytest.approx(chance_consistency(names), abs=0.01)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    said = [statement.sentence for statement in SceneStatements(Scenes(400, 1))]
    return Tokenizer(train_wordpiece(said, 200), 12)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Nlvr2Model:
    torch.manual_seed(0)
    settings = tiny.config().model
    return tiny.varied(Nlvr2Model(SaclModel(settings, tokenizer.size, pretrained=False), settings))


def evaluated(model: Nlvr2Model, statements, tokenizer: Tokenizer, batch_size: int = 7, **more) -> Nlvr2Result:
    return evaluate_statements(model, statements, tokenizer, CanonicalView(32), CPU, batch_size, **more)


def test_figures_are_those_of_the_model(model: Nlvr2Model, tokenizer: Tokenizer) -> None:
    """Statement by statement, without a batch."""
    statements = scene_statements(Scenes(90, 2))
    seen = 0

    def done(number: int) -> None:
        nonlocal seen
        seen += number

    model.train()
    result = evaluated(model, statements, tokenizer, done=done)
    assert model.training
    model.eval()
    assert evaluated(model, statements, tokenizer).probabilities == result.probabilities
    assert not model.training
    assert seen == 45
    right = []
    for statement, (identifier, verdict), probability in zip(
        statements, result.predictions, result.probabilities, strict=True
    ):
        images = [CanonicalView(32)(side.picture(), ())[None] for side in (statement.left, statement.right)]
        ids = torch.tensor(tokenizer.ids([statement.sentence]))
        with torch.no_grad():
            false, true = model(*images, ids, torch.ones_like(ids))[0].double().tolist()
        assert probability == pytest.approx(1 / (1 + torch.tensor(false - true).exp().item()), abs=1e-5)
        assert identifier == statement.identifier
        assert verdict == (true > false)
        right.append(verdict == statement.label)
    assert 0 < sum(right) < 45
    assert len({round(p, 3) for p in result.probabilities}) > 10
    assert result.figures["accuracy"] == (pytest.approx(sum(right) / 45), 0.5)
    names = [statement.identifier for statement in statements]
    groups = {group_of(name) for name in names}
    failed = {group_of(name) for name, good in zip(names, right, strict=True) if not good}
    assert result.figures["consistency"] == (pytest.approx(1 - len(failed) / len(groups)), chance_consistency(names))
    assert result.notes == []


def unlabelled(statement: Statement) -> Statement:
    return Statement(statement.identifier, statement.sentence, None, statement.left, statement.right)


def test_without_labels(model: Nlvr2Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    statements = scene_statements(Scenes(40, 2))
    labelled = evaluated(model, statements, tokenizer)
    result = evaluated(model, [unlabelled(s) for s in statements], tokenizer)
    assert result.figures == {}
    assert result.notes == ["20 of 20 statements have no label: no figures"]
    assert result.predictions == labelled.predictions
    path = tmp_path / "predictions.csv"
    path.write_text("what was there before\n")
    result.write_predictions(path)
    assert list(tmp_path.iterdir()) == [path]
    lines = path.read_text().splitlines()
    verdicts = ["True" if probability > 0.5 else "False" for probability in result.probabilities]
    assert lines == [f"{s.identifier},{verdict}" for s, verdict in zip(statements, verdicts, strict=True)]
    assert {line.split(",")[1] for line in lines} == {"True", "False"}
    some = evaluated(model, [*statements[:15], *map(unlabelled, statements[15:])], tokenizer)
    assert some.notes == ["5 of 20 statements have no label: they do not count in the figures"]
    assert some.figures == evaluated(model, statements[:15], tokenizer).figures
    assert some.predictions == labelled.predictions


class Lost:
    def picture(self) -> Picture:
        raise BadSample(SampleFault("bad", "", "image x", "no file x.png"))


def test_images_that_are_missing(model: Nlvr2Model, tokenizer: Tokenizer) -> None:
    statements = scene_statements(Scenes(40, 2))
    lost = Statement("dev-0-0-0", "a", True, statements[0].left, Lost())
    there = evaluated(model, statements, tokenizer)
    result = evaluated(model, [*statements[:5], lost, *statements[5:]], tokenizer, max_bad_share=0.05)
    assert result.figures == there.figures
    assert result.predictions == there.predictions
    assert result.notes == ["1 of 21 examples cannot be used: image x: no file x.png"]
    with pytest.raises(UserError, match=r"1 of 21 examples cannot be used: image x.*max_bad_share"):
        evaluated(model, [*statements, lost], tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_probabilities_that_are_not_finite_are_not_judged(
    value: float, model: Nlvr2Model, tokenizer: Tokenizer
) -> None:
    """A NaN is not more than a half, so that each statement would be judged false."""
    damaged = copy.deepcopy(model)
    next(parameter for name, parameter in damaged.named_parameters() if "image" in name).data.view(-1)[0] = value
    statements = scene_statements(Scenes(40, 2))
    with pytest.raises(SharedError, match=rf"^probabilities of 20 of 20 .*, those of '{statements[0].identifier}' for"):
        evaluated(damaged, statements, tokenizer)
