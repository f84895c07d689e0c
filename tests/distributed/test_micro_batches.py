"""Micro-batches give the gradients, losses and random draws of one pass over the whole global batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from contract import LOSSES, PAIRS, assert_contract, targets, whole_batch_gradient
from ranks import on_ranks
from vqa_questions import PLACEMENTS, batch_of, pretrained

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.sample import SampleFault
from sacl_ds.data.text import IGNORED
from sacl_ds.losses import HardNegatives
from sacl_ds.machine import this_machine
from sacl_ds.model.momentum import Momentum
from sacl_ds.tasks.nlvr2.data import StatementBatch
from sacl_ds.tasks.nlvr2.model import Nlvr2Model, Nlvr2Objective
from sacl_ds.tasks.vqa.model import VqaModel, VqaObjective
from sacl_ds.training.objective import CachedGradients, PretrainObjective
from sacl_ds.training.step import FrozenModels, Step, contrastive_step, summed_step

ROWS = 2  # of a micro-batch: each pair has one possible hard negative, so that ITM has nothing to draw


@dataclass(frozen=True)
class Known(FrozenModels):
    """A teacher whose features are known by key, and which draws random numbers each time it is asked."""

    image: dict[str, torch.Tensor] = field(default_factory=dict)
    text: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: list[str], teacher: tuple[torch.Tensor, torch.Tensor]) -> Known:
        image, text = (dict(zip(keys, side, strict=True)) for side in teacher)
        return cls(image=image, text=text)

    def teacher_features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        torch.rand(3)
        image, text = (torch.stack([side[key] for key in batch.keys]).float() for side in (self.image, self.text))
        return image, text


def step_of(rows: int = ROWS, coalesce: bool = False) -> Step:
    """With the alpha of `contract.targets`."""
    return Step(0, 17, torch.Generator().manual_seed(3), torch.device("cpu"), rows, coalesce, alpha=0.6)


def engine_of(run: RunConfig, stage: int, world: int, rows: int = ROWS) -> Any:
    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine

    train = {"global_batch_size": PAIRS, "micro_batch_size": rows}
    run = run.model_copy(update={"train": run.train.model_copy(update=train)})
    settings = resolve({"zero_optimization": {"stage": stage}}, run, world, this_machine("cpu"))
    return build_engine(tiny.objective(run), settings, run.optim)


def gradients_of(engine: Any) -> dict[str, torch.Tensor]:
    """Of all parameters, whole; what has none has 0."""
    from deepspeed.utils import safe_get_full_grad

    named = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    blank = {name: torch.zeros_like(p) for name, p in tiny.objective(tiny.config()).named_parameters()}
    return {name: torch.zeros_like(blank[name]) if g is None else g.cpu() for name, g in named.items()}


CASES = [("sacl", stage, coalesce) for stage in range(4) for coalesce in (False, True) if stage or not coalesce]
CASES += [("sacl, patches", 3, False), ("infonce", 2, False)]


def accumulating(rank: int, world: int, folder: Path) -> None:
    """float32 through DeepSpeed, ZeRO 0 to 3, reduced at every micro-batch or once."""
    from sacl_ds.training.engine import start_process

    start_process()
    torch.set_num_threads(1)
    whole, teacher = tiny.batch(PAIRS)
    whole = tiny.without_padding(whole)
    known = Known.of(whole.keys, teacher)
    block = PAIRS // world
    mine, _ = tiny.rows(whole, teacher, rank * block, (rank + 1) * block)
    for loss, stage, coalesce in CASES:
        engine = engine_of(tiny.config(**LOSSES[loss]), stage, world)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        for turn in range(2):  # nothing of a step is left in the next one
            losses, _, _ = contrastive_step(engine, mine, step_of(coalesce=coalesce), known)
            got = gradients_of(engine)
            if turn == 0:
                engine.step()
        if rank == 0:
            torch.save({"gradient": got, "losses": losses}, folder / f"{loss}, {stage}, {coalesce}.pt")
        engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_gradients(world: int, tmp_path: Path) -> None:
    on_ranks(world, accumulating, world, tmp_path)
    for loss, stage, coalesce in CASES:
        got = torch.load(tmp_path / f"{loss}, {stage}, {coalesce}.pt", weights_only=True)
        assert_contract(got["gradient"], whole_batch_gradient(loss, PAIRS // ROWS), 1e-4)


def one_graph(objective: PretrainObjective, parts: list[Batch], step: Step, known: Known, shift: int = 0) -> None:
    """Backward with the graph of all micro-batches at once; shift: of ITC's random numbers, away from the step's."""
    settings, looked = objective.settings, []
    for number, part in enumerate(parts):
        torch.manual_seed(step.seed_of(number) + shift)
        looked.append(objective(part, None))
    image, text = (torch.cat([each[side] for each in looked]) for side in ("image", "text"))
    teacher = [known.teacher_features(part) for part in parts]
    met = targets(tuple(torch.cat(side) for side in zip(*teacher, strict=True)), torch.float32)
    ids = torch.cat([part.pair_ids for part in parts])
    itc = objective.contrastive(image, text, objective.model.logit_scale(), ids, met).loss
    (settings.contrastive_weight * itc).backward()
    other, both = torch.tensor([1, 0]), torch.tensor([True, True])  # the only negative of a pair among two
    words = torch.tensor(sum(int((part.mlm_labels != IGNORED).sum()) for part in parts))
    for number, part in enumerate(parts):
        torch.manual_seed(step.seed_of(number))
        nothing = torch.zeros(ROWS, image.shape[1])
        alone = CachedGradients(
            nothing,
            nothing,
            torch.zeros(()),
            HardNegatives(other, other, both, both),
            torch.tensor(3 * ROWS * len(parts)),
            words,
        )
        objective(part, alone)["loss"].backward()


def distance(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    flat = [torch.cat([named[name].flatten() for name in expected]) for named in (got, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def dropping(rank: int, folder: Path) -> None:
    """Distances from one graph with the first pass's dropout in the second, and with another."""
    run = tiny.config(**LOSSES["sacl"])
    run = run.model_copy(update={"model": run.model.model_copy(update={"dropout": 0.3})})
    whole, teacher = tiny.batch(PAIRS)
    known = Known.of(whole.keys, teacher)
    engine = engine_of(run, 1, 1)
    engine.train()
    losses, _, _ = contrastive_step(engine, whole, step_of(), known)
    got = gradients_of(engine)
    away = {}
    for shift in (0, 1):
        objective = tiny.objective(run).train()
        one_graph(objective, whole.parts(ROWS), step_of(), known, shift)
        away[shift] = distance(got, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    torch.save({"away": away, "losses": losses}, folder / "dropped.pt")
    engine.destroy()


def test_random_numbers_are_replayed(tmp_path: Path) -> None:
    on_ranks(1, dropping, tmp_path)
    found = torch.load(tmp_path / "dropped.pt", weights_only=True)
    away, losses = found["away"], found["losses"]
    assert away[0] < 1e-5, away
    assert away[1] > 1e-2, away
    terms = sum(float(losses[name]) for name in ("itc", "itm", "mlm"))
    assert float(losses["loss"]) == pytest.approx(terms, rel=1e-6)
    assert 0 <= float(losses["itm_accuracy"]) <= 1


def believing(rank: int, folder: Path) -> None:
    """Beside a momentum model, whose predictions of masked tokens are made in the second pass."""
    run = tiny.config(matching_weight=0.0, **LOSSES["sacl"])
    settings = {"enabled": True, "queue_size": 12, "distill_weight": 0.4, "regulate_queue": False}
    run = run.model_copy(update={"momentum": run.momentum.model_copy(update=settings)})
    whole = tiny.batch(PAIRS)[0]
    found = []
    for rows in (PAIRS, ROWS):
        engine = engine_of(run, 2, 1, rows)
        momentum = Momentum(tiny.varied(tiny.objective(run).model), run.momentum)
        frozen = FrozenModels(momentum=momentum)
        seen = momentum.outputs(tiny.batch(PAIRS, seed=4)[0], False, "fp32")[0]
        momentum.push(*seen, 100 + whole.pair_ids)
        step = replace(step_of(rows), soft_weight=run.momentum.distill_weight)
        losses = contrastive_step(engine, whole, step, frozen)[0]
        found.append((losses, gradients_of(engine)))
        engine.destroy()
    torch.save(found, folder / "whole and in parts.pt")


def test_beside_a_momentum_model(tmp_path: Path) -> None:
    on_ranks(1, believing, tmp_path)
    (expected, gradient), (losses, got) = torch.load(tmp_path / "whole and in parts.pt", weights_only=True)
    assert distance(got, gradient) < 1e-5
    assert expected.keys() == losses.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-5), name


def averaging(rank: int, folder: Path) -> None:
    """Objectives that are means over rows, in micro-batches and whole, through ZeRO 2."""
    from deepspeed.utils import safe_get_full_grad

    from sacl_ds.ds_config import resolve
    from sacl_ds.training.engine import build_engine

    selection = PLACEMENTS["tower"]
    run = tiny.config(selection)
    labels = torch.arange(PAIRS) % 2
    one, other = (tiny.batch(PAIRS, seed)[0] for seed in (1, 101))
    pairs = StatementBatch(one.keys, one.images, other.images, one.input_ids, one.attention_mask, labels, one.pair_ids)
    made = []
    for make, batch in (
        (lambda: VqaObjective(VqaModel(pretrained(run), run.model, tiny.VOCABULARY)), batch_of(PAIRS)),
        (lambda: Nlvr2Objective(Nlvr2Model(pretrained(run), run.model)), pairs),
    ):
        found = []
        for rows in (PAIRS, ROWS):
            train = {"global_batch_size": PAIRS, "micro_batch_size": rows}
            here = run.model_copy(update={"train": run.train.model_copy(update=train)})
            torch.manual_seed(0)
            settings = resolve({"zero_optimization": {"stage": 2}}, here, 1, this_machine("cpu"))
            engine = build_engine(make().eval(), settings, here.optim)
            losses = summed_step(engine, batch, step_of(rows))
            found.append((losses, {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}))
            engine.destroy()
        made.append(found)
    torch.save(made, folder / "whole and in parts.pt")


def test_means_over_rows(tmp_path: Path) -> None:
    on_ranks(1, averaging, tmp_path)
    made = torch.load(tmp_path / "whole and in parts.pt", weights_only=True)
    assert len(made) == 2, "VQA and NLVR2"
    for (whole, expected), (summed, got) in made:
        known = {name: gradient for name, gradient in expected.items() if gradient is not None}
        assert distance(got, known) < 1e-5
        assert whole.keys() == summed.keys()
        for name, value in whole.items():
            assert float(summed[name]) == pytest.approx(float(value), rel=1e-5)


def test_parts_are_the_batch() -> None:
    """Texts are cut to the longest left, and which tokens are real and predicted is known of the parts, too."""
    batch = replace(tiny.without_padding(tiny.batch(PAIRS)[0]), faults=[SampleFault("bad", "s", "k", "r")])
    parts = batch.parts(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [key for part in parts for key in part.keys] == batch.keys
    rows = iter(range(PAIRS))
    for part in parts:
        assert part.faults == []
        assert part.input_ids.shape[1] == int(part.attention_mask.sum(1).max())
        assert torch.equal(part.input_ids.flatten()[part.token_places], part.input_ids[part.attention_mask.bool()])
        assert torch.equal(part.mlm_labels.flatten()[part.mlm_places], part.mlm_labels[part.mlm_labels != IGNORED])
        for at, row in zip(range(len(part)), rows, strict=False):
            length = int(batch.attention_mask[row].sum())
            assert torch.equal(part.input_ids[at, :length], batch.input_ids[row, :length])
            assert torch.equal(part.images[at], batch.images[row])
