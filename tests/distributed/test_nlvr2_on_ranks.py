"""NLVR2 on several ranks: gradients of the whole batch, through DeepSpeed too, and figures that no division changes."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import on_ranks

from sacl_ds.data.pictures import Picture
from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.data.scenes import Scenes
from sacl_ds.data.text import Tokenizer, train_wordpiece
from sacl_ds.data.transforms import CanonicalView
from sacl_ds.errors import SharedError
from sacl_ds.model.sacl import SaclModel
from sacl_ds.tasks.nlvr2.data import SceneStatements, Statement, StatementBatch, scene_statements
from sacl_ds.tasks.nlvr2.model import Nlvr2Model, Nlvr2Objective
from sacl_ds.tasks.nlvr2.task import evaluate_statements

ROWS, STATEMENTS = 8, 23
SELECTIONS = {
    "none": None,
    "tower": {"placement": "tower", "layers": [1, 2], "keep_rate": 0.5},
    "output": {"placement": "output", "keep_rate": 0.5},
}
CPU = torch.device("cpu")


def objective(selection: str, vocabulary: int = tiny.VOCABULARY) -> Nlvr2Objective:
    """Every parameter moved, so that none of the shared ones can be mistaken for another."""
    settings = tiny.config(SELECTIONS[selection]).model
    torch.manual_seed(0)
    model = Nlvr2Model(SaclModel(settings, vocabulary, pretrained=False), settings)
    return tiny.varied(Nlvr2Objective(model)).train()


def rows(start: int, stop: int) -> StatementBatch:
    """Of a batch of ROWS; every part is as long as the whole."""
    one, other = (tiny.batch(ROWS, seed)[0] for seed in (1, 2))
    part = slice(start, stop)
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0])
    return StatementBatch(
        one.keys[part], one.images[part], other.images[part], one.input_ids[part], one.attention_mask[part],
        labels[part], one.pair_ids[part],
    )  # fmt: skip


def expected_of(selection: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and losses of one process with the whole batch, float64."""
    whole = objective(selection).double()
    losses = whole(rows(0, ROWS))
    losses["loss"].backward()
    return {name: p.grad for name, p in whole.named_parameters()}, {k: v.item() for k, v in losses.items()}


def assert_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert total > 0
    for name, gradient in expected.items():
        base = max(gradient.norm(), 1e-4 * total)
        error = (got[name].double().view(gradient.shape) - gradient).norm() / base
        assert error < tolerance, f"{name}: {error:.2e}"


def plain_ranks(rank: int, world: int, folder: Path) -> None:
    block = ROWS // world
    for selection in SELECTIONS:
        mine = objective(selection).double()
        losses = mine(rows(rank * block, (rank + 1) * block))
        losses["loss"].backward()
        means = {name: value.detach().clone() for name, value in losses.items()}
        gradients = {name: parameter.grad for name, parameter in mine.named_parameters()}
        for value in (*means.values(), *gradients.values()):
            dist.all_reduce(value)
            value /= world
        if rank == 0:
            torch.save((gradients, means), folder / f"{selection}.pt")


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    on_ranks(world, plain_ranks, world, tmp_path)
    for selection in SELECTIONS:
        gradients, means = torch.load(tmp_path / f"{selection}.pt", weights_only=True)
        expected, losses = expected_of(selection)
        assert_gradients(gradients, expected, 1e-9)
        assert {name: value.item() for name, value in means.items()} == pytest.approx(losses, abs=1e-6)


def engine_ranks(rank: int, world: int, folder: Path) -> None:
    """float32 through DeepSpeed: gradients, then two steps, the second of which ZeRO 3 prefetches by the first, and
    the weights as a checkpoint takes them."""
    from deepspeed.utils import safe_get_full_grad

    from sacl_ds.ds_config import resolve
    from sacl_ds.machine import this_machine
    from sacl_ds.training.engine import build_engine, consolidated_state_dict, start_process

    start_process()
    torch.set_num_threads(1)
    block = ROWS // world
    batch = rows(rank * block, (rank + 1) * block)
    for selection, choice in SELECTIONS.items():
        for stage in range(4) if selection == "none" else (3,):
            run = tiny.config(choice)
            train = run.train.model_copy(update={"global_batch_size": ROWS})
            # eps far above rounding, which Adam would blow up where a gradient is nothing else
            optim = run.optim.model_copy(update={"eps": 1e-4, "lr_image": 1e-3, "lr_text": 1e-3})
            run = run.model_copy(update={"train": train, "optim": optim})
            settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
            engine = build_engine(objective(selection), settings, run.optim)
            gradients = {}
            for step in range(2):
                engine.backward(engine(batch)["loss"])
                if step == 0:
                    found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
                    gradients = {name: gradient.cpu().clone() for name, gradient in found.items()}
                engine.step()
            state = consolidated_state_dict(engine, engine.module.model)
            if rank == 0:
                torch.save((gradients, state), folder / f"{selection}{stage}.pt")
            engine.destroy()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_through_deepspeed(world: int, tmp_path: Path) -> None:
    on_ranks(world, engine_ranks, world, tmp_path)
    states = {}
    for path in sorted(tmp_path.glob("*.pt")):
        gradients, states[path.stem] = torch.load(path, weights_only=True)
        assert_gradients(gradients, expected_of(path.stem[:-1])[0], 2e-4)
    assert states.keys() == {"none0", "none1", "none2", "none3", "output3", "tower3"}
    start = objective("none").model.state_dict()
    for stage in range(4):
        state = states[f"none{stage}"]
        assert state.keys() == start.keys()
        for name, value in state.items():
            torch.testing.assert_close(value.view(start[name].shape), states["none0"][name], rtol=0, atol=1e-5)
    moved = [not torch.equal(states["none3"][name].view(value.shape), value) for name, value in start.items()]
    assert sum(moved) > 0.8 * len(moved)


class Lost:
    def picture(self) -> Picture:
        raise BadSample(SampleFault("bad", "", "image x", "no file x.png"))


def statements() -> list[Statement]:
    """Their number divides by neither 2 nor 3; one has no picture, one no label."""
    found = scene_statements(Scenes(2 * STATEMENTS, 5))
    old = found[4]
    found[4] = Statement(old.identifier, old.sentence, old.label, Lost(), old.right)
    old = found[9]
    found[9] = Statement(old.identifier, old.sentence, None, old.left, old.right)
    return found


def evaluating_ranks(rank: int, world: int, folder: Path, stage: int | None, ways: list[str]) -> None:
    torch.set_num_threads(1)
    said = [statement.sentence for statement in SceneStatements(Scenes(400, 1))]
    tokenizer = Tokenizer(train_wordpiece(said, 200), 12)
    for selection in ways:
        module = objective(selection, tokenizer.size)
        if stage is not None:
            from sacl_ds.ds_config import resolve
            from sacl_ds.machine import this_machine
            from sacl_ds.training.engine import build_engine, start_process

            start_process()
            torch.set_num_threads(1)
            run = tiny.config(SELECTIONS[selection])
            run = run.model_copy(update={"train": run.train.model_copy(update={"global_batch_size": ROWS})})
            settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
            engine = build_engine(module, settings, run.optim)
            with torch.no_grad():
                # a pass of the whole, as in training, shows ZeRO 3 which parameters one module uses of another
                engine(rows(0, 2))
            module = engine.module
        told = 0

        def done(count: int) -> None:
            nonlocal told
            told += count

        view = CanonicalView(32)
        model = module.model.train()
        result = evaluate_statements(model, statements(), tokenizer, view, CPU, 5, done, max_bad_share=0.1)
        assert model.training
        # every world-th statement: what one rank has done is its own part
        assert told == len(range(rank, STATEMENTS, world))
        with pytest.raises(SharedError, match="1 of 23 examples cannot be used: image x"):
            evaluate_statements(model, statements(), tokenizer, view, CPU, 5)
        torch.save(vars(result), folder / f"{selection} {rank}.pt")


@pytest.mark.parametrize(("world", "stage"), [(2, None), (3, None), (2, 3)])
def test_the_division_into_ranks_changes_nothing(world: int, stage: int | None, tmp_path: Path) -> None:
    ways = ["none", "tower"]
    evaluating_ranks(0, 1, tmp_path, None, ways)
    alone = {selection: torch.load(tmp_path / f"{selection} 0.pt", weights_only=True) for selection in ways}
    on_ranks(world, evaluating_ranks, world, tmp_path, stage, ways)
    for selection, expected in alone.items():
        results = [torch.load(tmp_path / f"{selection} {rank}.pt", weights_only=True) for rank in range(world)]
        assert all(result == results[0] for result in results)
        (result, *_) = results
        assert len(result["predictions"]) == STATEMENTS - 1
        probabilities = torch.tensor([result["probabilities"], expected["probabilities"]], dtype=torch.float64)
        assert (probabilities[0] - probabilities[1]).abs().max() < 1e-5
        assert probabilities[1].std() > 1e-3
        assert (probabilities[1] - 0.5).abs().min() > 1e-5, "no verdict hangs on rounding"
        for name in ("figures", "predictions", "notes"):
            assert result[name] == expected[name], name
        assert len(result["notes"]) == 2
