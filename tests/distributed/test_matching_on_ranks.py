"""With drop_below and matching_regulated, ITM never draws a negative that ITC has removed: the objective as it is
trained, on one rank and on two, in one pass and in micro-batches, beside a momentum model with a queue or without."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from dropped import kept_negatives, same_pairs
from ranks import on_ranks

from sacl_ds.config import RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.ds_config import resolve
from sacl_ds.losses import HardNegatives, Regulation
from sacl_ds.machine import this_machine
from sacl_ds.model.momentum import Momentum
from sacl_ds.training import objective
from sacl_ds.training.step import FrozenModels, Step, contrastive_step

PAIRS, DRAWS = 16, 6
REGULATION = Regulation(alpha=0.6, sharpness=6.0, teacher_sharpness=9.0, drop_below=0.75)
NAMES = ("image", "text", "ids", "teacher_image", "teacher_text")
CASES = {  # rows of a micro-batch as a share of the rank's pairs; pairs in the queue, None without momentum model
    "one pass": (1.0, None),
    "micro-batches": (0.5, None),
    "momentum": (1.0, 0),
    "momentum, queue, micro-batches": (0.25, 9),
}


def run_of(queue: int | None, rows: int) -> RunConfig:
    run = tiny.config(
        matching_regulated=True, matching_hardness=0.5, mlm_weight=0.0, sharpness=REGULATION.sharpness,
        teacher_sharpness=REGULATION.teacher_sharpness, drop_below=REGULATION.drop_below,
    )  # fmt: skip
    train = run.train.model_copy(update={"global_batch_size": PAIRS, "micro_batch_size": rows})
    if queue is None:
        return run.model_copy(update={"train": train})
    momentum = run.momentum.model_copy(update={"enabled": True, "queue_size": queue})
    return run.model_copy(update={"train": train, "momentum": momentum})


@dataclass(frozen=True)
class Known(FrozenModels):
    """A teacher whose (image, text) features are known by key, beside a momentum model."""

    features: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def teacher_features(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = zip(*(self.features[key] for key in batch.keys), strict=True)
        return torch.stack(image).float(), torch.stack(text).float()


def drawing(rank: int, world: int, folder: Path) -> None:
    from sacl_ds.training.engine import build_engine, start_process

    start_process()
    torch.set_num_threads(1)
    draw = objective.hard_negatives
    whole, teacher = tiny.batch(PAIRS)
    mine, _ = tiny.rows(whole, teacher, rank * PAIRS // world, (rank + 1) * PAIRS // world)
    by_key = dict(zip(whole.keys, zip(*teacher, strict=True), strict=True))
    for case, (share, queue) in CASES.items():
        rows = int(share * len(mine))
        run = run_of(queue, rows)
        momentum = None
        if queue is not None:
            momentum = Momentum(tiny.varied(tiny.objective(run).model), run.momentum, teacher="some")
            if queue:
                earlier, old_teacher = tiny.batch(queue, seed=7)
                features = momentum.outputs(earlier, False, "fp32")[0]
                momentum.push(*features, 100 + earlier.pair_ids, tuple(side.float() for side in old_teacher))
        settings = resolve({"zero_optimization": {"stage": 1}}, run, world, this_machine("cpu"))
        engine = build_engine(tiny.objective(run), settings, run.optim)
        drawn: list[dict[str, Any]] = []

        def recorded(image, text, *rest: Any, drawn: list = drawn) -> HardNegatives:
            negatives = draw(image, text, *rest)
            drawn.append({"features": (image.detach(), text.detach()), **vars(negatives)})
            return negatives

        objective.hard_negatives = recorded
        frozen, generator = Known(momentum=momentum, features=by_key), torch.Generator().manual_seed(rank)
        keys = old = None
        for number in range(DRAWS):
            shares = {"alpha": REGULATION.alpha, "soft_weight": 0.3 if momentum else 0.0}
            step = Step(number, 17, generator, torch.device("cpu"), rows, **shares)
            *_, targets = contrastive_step(engine, mine, step, frozen)
        if momentum:
            keys, old = (targets.keys.image, targets.keys.text), {name: momentum.queue[name] for name in NAMES}
        torch.save({"drawn": drawn, "keys": keys, "queue": old}, folder / f"{case} {rank}.pt")
        engine.destroy()


def together(found: list[dict[str, Any]], case: str, step: int, rows: int) -> tuple[list, dict[str, np.ndarray]]:
    """The step's features of all ranks, and its draws as positions in the global batch."""
    features, draws = [], {name: [] for name in ("text", "image", "text_found", "image_found")}
    for rank, of_rank in enumerate(found):
        parts = of_rank["drawn"][step * (PAIRS // len(found) // rows) :][: PAIRS // len(found) // rows]
        assert [len(part["text"]) for part in parts] == [rows] * len(parts)
        for number, part in enumerate(parts):
            start = rank * PAIRS // len(found) + number * rows
            features.append(part["features"])
            for name, values in draws.items():
                values.append(part[name].numpy() if name.endswith("found") else part[name].numpy() + start)
    sides = [torch.cat(side) for side in zip(*features, strict=True)]
    return sides, {name: np.concatenate(values) for name, values in draws.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_that_itc_removed_is_drawn(world: int, tmp_path: Path) -> None:
    on_ranks(world, drawing, world, tmp_path)
    whole, teacher = tiny.batch(PAIRS)
    for case, (share, queue) in CASES.items():
        rows = int(share * PAIRS // world)
        found = [torch.load(tmp_path / f"{case} {rank}.pt", weights_only=True) for rank in range(world)]
        ids, old = whole.pair_ids, [torch.empty(0, 16)] * 2
        columns_of_teacher = teacher
        if queue is not None:
            momentum = [torch.cat([each["keys"][side] for each in found]) for side in range(2)]
        if queue:
            queued = found[0]["queue"]
            ids, old = torch.cat([ids, queued["ids"]]), [queued["image"], queued["text"]]
            columns_of_teacher = [
                torch.cat([mine, queued[f"teacher_{name}"].double()])
                for mine, name in zip(teacher, ("image", "text"), strict=True)
            ]
        same = same_pairs(ids, PAIRS, queue or 0)
        blocks = np.arange(PAIRS) // rows
        within = blocks[:, None] == blocks
        removed = total = 0
        for step in range(DRAWS):
            features, draws = together(found, case, step, rows)
            keys = features if queue is None else momentum
            for anchor, key, name in ((0, 1, "text"), (1, 0, "image")):
                columns = torch.cat([keys[key], old[key]])
                of_teacher = teacher[anchor], columns_of_teacher[key]
                each = kept_negatives(features[anchor], columns, of_teacher, same, REGULATION)
                assert each.margin > 1e-6
                possible = each.kept & within
                exists = draws[f"{name}_found"]
                assert (exists == possible.any(1)).all(), case
                assert possible[np.arange(PAIRS), draws[name]][exists].all(), case
                removed += (~each.kept & ~same[:, :PAIRS] & within).sum()
                total += (~same[:, :PAIRS] & within).sum()
        assert 0.2 < removed / total < 0.95, f"{case}: {removed} of {total}"
