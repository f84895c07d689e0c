"""VQA on several ranks: gradients as in one process, and the same figures, answers and scores everywhere."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import on_ranks
from vqa_questions import PLACEMENTS, batch_of, pretrained

from sacl_ds.data.order import Place
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.distributed import rank
from sacl_ds.errors import SharedError
from sacl_ds.machine import this_machine
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.examples import SceneImage
from sacl_ds.tasks.vqa.batch import QuestionBatch, QuestionCollator
from sacl_ds.tasks.vqa.data import Question, answer_list, scene_questions, with_words
from sacl_ds.tasks.vqa.evaluation import (
    VqaResult,
    evaluate_questions,
    majority_answers,
    majority_baseline,
    vqa_accuracy,
)
from sacl_ds.tasks.vqa.model import VqaModel, VqaObjective

QUESTIONS = 8
WORDS = 100  # of the model; the tokenizers here have fewer
VIEW = CanonicalView(32)


def part_of(batch: QuestionBatch, start: int, stop: int) -> QuestionBatch:
    """Rows start to stop of a batch, with their answers."""
    mine = (batch.answer_question >= start) & (batch.answer_question < stop)
    rows = slice(start, stop)
    return QuestionBatch(
        batch.keys[rows],
        batch.images[rows],
        batch.input_ids[rows],
        batch.attention_mask[rows],
        batch.answer_ids[mine],
        batch.answer_mask[mine],
        batch.answer_weight[mine],
        batch.answer_question[mine] - start,
        batch.pair_ids[rows],
    )


def objective(placement: str) -> VqaObjective:
    run = tiny.config(PLACEMENTS[placement])
    return VqaObjective(VqaModel(pretrained(run), run.model, WORDS))


def whole_gradient(placement: str) -> dict[str, torch.Tensor]:
    """One process with all questions, in float64."""
    alone = objective(placement).double()
    alone(batch_of(QUESTIONS))["loss"].backward()
    return {name: p.grad for name, p in alone.named_parameters()}


def plain_ranks(number: int, world: int, folder: Path) -> None:
    """float64, no engine: gradients averaged over ranks, as an engine does."""
    share = QUESTIONS // world
    for placement in ("none", "tower"):
        mine = objective(placement).double()
        mine(part_of(batch_of(QUESTIONS), number * share, (number + 1) * share))["loss"].backward()
        for parameter in mine.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        if number == 0:
            torch.save({name: p.grad for name, p in mine.named_parameters()}, folder / f"{placement}.pt")


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_without_engine(world: int, tmp_path: Path) -> None:
    on_ranks(world, plain_ranks, world, tmp_path)
    for placement in ("none", "tower"):
        assert_same(torch.load(tmp_path / f"{placement}.pt"), whole_gradient(placement), 1e-9)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        base = max(gradient.norm(), 1e-4 * total)
        assert (got[name].double() - gradient).norm() / base < tolerance, name


def words_of(questions: list[Question]) -> Tokenizer:
    texts = [each.question for each in questions] + [each.answers[0] for each in questions if each.answers]
    return with_words(Tokenizer(train_wordpiece(["a red ring"] * 3, 100), 12), texts)


def engine_ranks(number: int, world: int, folder: Path) -> None:
    """Through DeepSpeed, ZeRO 2 and 3: gradients, then the evaluation with partitioned parameters."""
    from deepspeed.utils import safe_get_full_grad

    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    share = QUESTIONS // world
    for stage in (2, 3):
        run = tiny.config()
        run = run.model_copy(update={"train": run.train.model_copy(update={"global_batch_size": QUESTIONS})})
        settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
        engine = build_engine(objective("none"), settings, run.optim)
        part = part_of(batch_of(QUESTIONS), number * share, (number + 1) * share)
        engine.backward(engine(part)["loss"])
        got = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        if number == 0:
            torch.save({name: gradient.cpu() for name, gradient in got.items()}, folder / f"{stage}.pt")
        result = evaluated(engine.module.model, 5)
        torch.save(vars(result), folder / f"result{stage} {number}.pt")
        engine.step()
        engine.destroy()


def test_engines(tmp_path: Path) -> None:
    on_ranks(2, engine_ranks, 2, tmp_path)
    expected = evaluated(objective("none").model, 5)
    for stage in (2, 3):
        assert_same(torch.load(tmp_path / f"{stage}.pt"), whole_gradient("none"), 1e-4)
        for number in range(2):
            assert_results(VqaResult(**torch.load(tmp_path / f"result{stage} {number}.pt")), expected)


def evaluated(model: VqaModel, batch_size: int, done: list[int] | None = None) -> VqaResult:
    """Of 5 scenes' questions, with the tokenizer's ids below the model's words."""
    questions = scene_questions(Scenes(5, seed=1))
    tokenizer = words_of(questions)
    assert tokenizer.size <= WORDS
    model.train()
    result = evaluate_questions(
        model,
        questions,
        tokenizer,
        VIEW,
        torch.device("cpu"),
        batch_size,
        answer_list(questions, 1),
        top=9,
        done=(lambda count: None) if done is None else done.append,
        baseline=majority_answers(questions[:30]),
    )
    assert model.training
    return result


def assert_results(got: VqaResult, expected: VqaResult) -> None:
    assert got.predictions == expected.predictions
    assert got.notes == expected.notes
    assert got.scores == pytest.approx(expected.scores, abs=1e-5)
    assert got.figures.keys() == expected.figures.keys()
    for name, figure in expected.figures.items():
        assert got.figures[name] == pytest.approx(figure, nan_ok=True), name


def evaluation_ranks(number: int, folder: Path) -> None:
    done: list[int] = []
    result = evaluated(objective("tower").model, 4, done)
    torch.save(vars(result) | {"done": sum(done)}, folder / f"{number}.pt")


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_evaluation(world: int, tmp_path: Path) -> None:
    expected = evaluated(objective("tower").model, 7)
    questions = scene_questions(Scenes(5, seed=1))
    assert len(questions) % 2
    assert len(questions) % 3
    on_ranks(world, evaluation_ranks, tmp_path)
    done = 0
    for number in range(world):
        got = torch.load(tmp_path / f"{number}.pt")
        done += got.pop("done")
        assert_results(VqaResult(**got), expected)
    assert done == len(questions)


def test_figures_are_means_of_the_official_accuracy() -> None:
    questions = scene_questions(Scenes(5, seed=1))
    result = evaluated(objective("none").model, 4)
    assert [each["question_id"] for each in result.predictions] == [each.question_id for each in questions]
    right = [vqa_accuracy(said["answer"], q.answers) for said, q in zip(result.predictions, questions, strict=True)]
    groups = {"accuracy": set(range(len(questions)))}
    for number, question in enumerate(questions):
        for kind in (question.kind, question.answer_type):
            groups.setdefault(f"accuracy/{kind}", set()).add(number)
    assert result.figures.keys() == groups.keys()
    for name, members in groups.items():
        value, chance = result.figures[name]
        assert value == pytest.approx(sum(right[number] for number in members) / len(members))
        assert chance == pytest.approx(majority_baseline(questions[:30], [questions[number] for number in members]))
    assert len({each["answer"] for each in result.predictions}) > 1


def ask(questions: list[Question], answers: list[str], tokenizer: Tokenizer | None = None, **more) -> VqaResult:  # type: ignore[no-untyped-def]
    tokenizer = tokenizer or words_of(scene_questions(Scenes(5, seed=1)))
    return evaluate_questions(
        objective("none").model, questions, tokenizer, VIEW, torch.device("cpu"), 4, answers, **more
    )


def test_without_labels(tmp_path: Path) -> None:
    scenes = Scenes(3, seed=1)
    questions = [Question(SceneImage(scenes, index), "what colour ?", index, []) for index in range(3)]
    result = ask(questions, ["red", "blue"])
    assert result.figures == {}
    assert result.notes == ["no labels: no accuracy; the predictions can be judged where the labels are"]
    result.write_predictions(tmp_path / "answers.json")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]
    written = json.loads((tmp_path / "answers.json").read_text())
    assert written == result.predictions
    assert [each.keys() for each in written] == [{"question_id", "answer"}] * 3
    assert {each["answer"] for each in written} <= {"red", "blue"}


def test_scores_that_are_not_finite_are_not_judged() -> None:
    """All answers would be as likely as the first."""
    questions, model = scene_questions(Scenes(2, seed=1)), objective("none").model
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "decoder" in name).view(-1)[0] = torch.nan
    words = words_of(questions)
    line = rf"^scores of (\d+) of \1 examples are not finite, those of '{questions[0].question_id}' for"
    with pytest.raises(SharedError, match=line):
        evaluate_questions(model, questions, words, VIEW, torch.device("cpu"), 4, ["red", "blue"])


def test_answers_that_look_the_same() -> None:
    questions = scene_questions(Scenes(2, seed=1))
    words = Tokenizer(train_wordpiece(["red blue"] * 3, 100), 12)
    result = ask(questions, ["red", "α", "β", "blue"], words)
    alike, lost = result.notes
    assert alike == "2 answers of the list have the same tokens as another and cannot be told apart: 'α', 'β'"
    assert lost.startswith(
        f"to {sum(not {'red', 'blue'} & set(each.answers) for each in questions)} of {len(questions)} "
    )
    assert "β" not in {each["answer"] for each in result.predictions}
    assert not any("tokens" in note for note in ask(questions, ["red", "α", "β"], with_words(words, ["α β"])).notes)
    with pytest.raises(ValueError, match="no answers to choose from"):
        ask(questions, [])


class _Missing:
    key = "image 7"

    def picture(self):  # type: ignore[no-untyped-def]
        from sacl_ds.tasks.examples import ImageFile

        return ImageFile(self.key, (Path("/nowhere/7.jpg"),)).picture()


def missing_ranks(number: int, folder: Path) -> None:
    questions = scene_questions(Scenes(2, seed=1))[:11]
    questions[4] = Question(_Missing(), "what colour ?", 999, ["red"] * 10, "colour", "other")
    answers = answer_list(questions, 1)
    with pytest.raises(SharedError) as raised:
        ask(questions, answers)
    line = str(raised.value)
    assert line.startswith("1 of 11 examples cannot be used: image 7: no file /nowhere/7.jpg; that is more than")
    result = ask(questions, answers, max_bad_share=0.1)
    assert result.notes == ["1 of 11 examples cannot be used: image 7: no file /nowhere/7.jpg"]
    del questions[4]
    without = ask(questions, answers)
    assert result.predictions == without.predictions
    assert result.figures.keys() == without.figures.keys()
    for name, (value, _) in without.figures.items():
        assert result.figures[name][0] == pytest.approx(value)
    (folder / str(rank())).touch()


def test_missing_images(tmp_path: Path) -> None:
    on_ranks(2, missing_ranks, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_training_lowers_the_loss_of_what_is_then_answered() -> None:
    """A few questions learnt by heart are answered, all of them: batch, objective, ranking and accuracy agree."""
    questions = [
        each for each in scene_questions(Scenes(2, seed=1)) if each.kind in ("count", "colour", "place", "shape")
    ]
    texts = [text for each in questions for text in (each.question, each.answers[0])]
    tokenizer, run = Tokenizer(train_wordpiece(texts * 3, 400), 12), tiny.config()
    torch.manual_seed(0)
    model = VqaModel(SaclModel(run.model, tokenizer.size, pretrained=False), run.model, tokenizer.size)
    collator = QuestionCollator(tokenizer, lambda text: VIEW, seed=0)
    batch = collator([collator.item(each, Place(0, 0, 0)) for each in questions])
    objective = VqaObjective(model).train()
    optimizer = torch.optim.Adam(objective.parameters(), 5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    result = evaluate_questions(
        model, questions, tokenizer, VIEW, torch.device("cpu"), 3, answer_list(questions, 1), top=5
    )
    assert result.figures["accuracy"][0] == 1.0
