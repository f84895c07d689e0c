"""Twenty steps with the momentum model, its queue and soft targets, against a simulation that shares no code with them.

The simulation is one process with the whole batch; its losses are written from the formulas of docs/lab/computation.md,
dense, and its queue is a list.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from sacl_ds.config import MomentumConfig, RunConfig
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.model.momentum import Momentum
from sacl_ds.training.schedules import soft_weight
from sacl_ds.training.step import FrozenModels, Step

PAIRS, STEPS, EPOCH = 10, 20, 75  # pairs of a batch, steps, pairs of an epoch: soft targets grow for 7.5 steps
ALPHA, KAPPA, KAPPA_T, DECAY, MLM = 0.6, 5.0, 3.0, 0.9, 0.5
SACL = {"sharpness": KAPPA, "teacher_sharpness": KAPPA_T}
CASES = {
    "sacl, regulated queue": (SACL, {"queue_size": 23}),
    "sacl, plain queue": (SACL, {"queue_size": 23, "regulate_queue": False}),
    "sacl, queue shorter than a batch": (SACL, {"queue_size": 7}),
    "infonce": ({"contrastive": "infonce"}, {"queue_size": 23}),
    "sacl, patches": (SACL | {"selection": {"placement": "output", "keep_rate": 0.5}}, {"queue_size": 23}),
    "infonce, no queue": ({"contrastive": "infonce"}, {"queue_size": 0, "distill_weight": 1.0}),
}


def run_of(case: str) -> RunConfig:
    loss, momentum = CASES[case]
    run = tiny.config(matching_weight=0.0, mlm_weight=MLM, **loss)
    settings = MomentumConfig(enabled=True, decay=DECAY, **momentum)
    train = run.train.model_copy(update={"global_batch_size": PAIRS})
    return run.model_copy(update={"momentum": settings, "train": train})


def queues_teacher(run: RunConfig) -> bool:
    return run.loss.contrastive == "sacl" and run.momentum.regulate_queue


def batch_of(step: int) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """With ids that collide within the batch and with those of earlier steps, in either column."""
    batch, teacher = tiny.batch(PAIRS, seed=100 + step)
    ids = torch.randint(0, 60, (PAIRS, 2), generator=torch.Generator().manual_seed(step))
    return replace(batch, pair_ids=ids), teacher


def optimizer_of(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def ours_on_ranks(rank: int, world: int, folder: Path) -> None:
    """Float64, gradients averaged over ranks as an engine does; the order of a step is that of `PretrainTask.step`."""
    part = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    for case in CASES:
        run = run_of(case)
        objective = tiny.objective(run).double()
        momentum = Momentum(objective.model, run.momentum, teacher="some" if queues_teacher(run) else "")
        optimizer = optimizer_of(objective.parameters())
        losses = []
        for step in range(STEPS):
            batch, teacher = tiny.rows(*batch_of(step), part.start, part.stop)
            weight = soft_weight(step, run, EPOCH)
            frozen = FrozenModels(momentum=momentum)
            features, token_logits = momentum.outputs(batch, weight > 0, "fp32")
            now = Step(step, 0, torch.Generator(), torch.device("cpu"), PAIRS, alpha=ALPHA, soft_weight=weight)
            targets = frozen.targets(now, teacher, features, token_logits)
            out = objective(batch, targets)
            optimizer.zero_grad(set_to_none=False)
            out["loss"].backward()
            for parameter in objective.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
            optimizer.step()
            momentum.update(objective.model.named_parameters())
            momentum.push(targets.keys.image, targets.keys.text, batch.pair_ids, teacher)
            terms = torch.stack([out[name].detach() for name in ("loss", "itc", "mlm")])
            dist.all_reduce(terms)
            losses.append(terms / world)
        torch.save(
            {
                "losses": torch.stack(losses),
                "parameters": objective.model.state_dict(),
                "average": momentum.average.state_dict(),
                "queue": {name: momentum.queue[name] for name in ("image", "text", "ids", "teacher_image")},
            },
            folder / f"{case} {rank}.pt",
        )


def contrastive(student, average, teacher, ids, queue, scale, settings, regulate_queue: bool, a: float) -> Tensor:
    """ITC of the whole batch. student, average, teacher: (images, texts); queue: lists of rows by name."""
    directions = []
    n, m = len(ids), len(queue["ids"])
    every_id = torch.cat([ids, *(row[None] for row in queue["ids"])])
    negative = torch.tensor([[not bool((x == y).any()) for y in every_id] for x in ids])
    for mine, theirs in ((0, 1), (1, 0)):
        name = ("image", "text")[theirs]
        keys = torch.cat([average[theirs], *(row[None] for row in queue[name])])
        cosine = student[mine] @ keys.T
        e = (scale * cosine).exp()
        own = e[torch.arange(n), torch.arange(n)]
        weight = torch.ones(n, n + m, dtype=torch.float64)
        if settings.contrastive == "sacl":
            of_teacher = torch.cat([teacher[theirs], *(row[None] for row in queue[f"teacher_{name}"])])
            s = ALPHA * (KAPPA_T * teacher[mine] @ of_teacher.T).exp() + (1 - ALPHA) * (KAPPA * cosine.detach()).exp()
            columns = n + m if regulate_queue else n
            among = negative[:, :columns]
            inverse = torch.where(among, 1 / s[:, :columns], 0.0)
            weight[:, :columns] = among.sum(1, keepdim=True) * inverse / inverse.sum(1, keepdim=True)
        hard = torch.log1p((torch.where(negative, weight * e, 0.0)).sum(1) / own)
        candidate = negative | torch.eye(n, n + m, dtype=torch.bool)
        q = torch.where(candidate, (scale.detach() * average[mine] @ keys.T).exp(), 0.0)
        p = torch.where(candidate, e, 0.0)
        q, p = (x / x.sum(1, keepdim=True) for x in (q, p))
        soft = -(q[candidate] * p[candidate].log()).sum() / n
        directions.append((1 - a) * hard.mean() + a * soft)
    return sum(directions) / 2


def simulated(case: str) -> dict:
    run = run_of(case)
    model, average = (tiny.objective(run).double().model for _ in range(2))
    optimizer = optimizer_of(model.parameters())
    names = ("image", "text", "ids", "teacher_image", "teacher_text")
    queue: dict[str, list[Tensor]] = {name: [] for name in names}
    losses = []
    for step in range(STEPS):
        batch, teacher = batch_of(step)
        a = run.momentum.distill_weight * min(1.0, step * PAIRS / EPOCH)
        features, token_logits = [], []
        for each in (model, average):
            with torch.set_grad_enabled(each is model):
                images, image = each.encode_image(batch.images)
                text = each.encode_text(batch.input_ids, batch.attention_mask)[1]
                states = each.text_encoder(batch.masked_ids, batch.attention_mask)
                tokens = each.image_tokens(images, states[:, 0])
                fused = each.fuse(states, batch.attention_mask, tokens)
                features.append((image, text))
                token_logits.append(each.token_logits(fused[batch.mlm_labels != IGNORED]))
        assert model.logit_scale.log_scale > 0, "the simulation has no clamp"
        scale = model.logit_scale.log_scale.exp().squeeze(0)
        itc = contrastive(*features, teacher, batch.pair_ids, queue, scale, run.loss, run.momentum.regulate_queue, a)
        hot = torch.nn.functional.one_hot(batch.mlm_labels[batch.mlm_labels != IGNORED], tiny.VOCABULARY).double()
        target = (1 - a) * hot + a * token_logits[1].softmax(1)
        mlm = -(target * token_logits[0].log_softmax(1)).sum(1).mean()
        loss = itc + MLM * mlm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(torch.stack([loss, itc, mlm]).detach())
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.copy_(DECAY * mean + (1 - DECAY) * value)
        for name, rows in zip(names, (*features[1], batch.pair_ids, *teacher), strict=True):
            queue[name] = [*queue[name], *rows][max(0, len(queue[name]) + PAIRS - run.momentum.queue_size) :]
    return {"losses": torch.stack(losses), "parameters": model.state_dict(), "average": average.state_dict(), **queue}


def near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max())))


@pytest.fixture(scope="module")
def expected() -> dict[str, dict]:
    return {case: simulated(case) for case in CASES}


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_twenty_steps_are_those_of_the_simulation(world: int, expected: dict[str, dict], tmp_path: Path) -> None:
    on_ranks(world, ours_on_ranks, world, tmp_path)
    for case, simulation in expected.items():
        size = run_of(case).momentum.queue_size
        for rank in range(world):
            got = torch.load(tmp_path / f"{case} {rank}.pt", weights_only=True)
            assert near(got["losses"], simulation["losses"]), case
            for room in ("parameters", "average"):
                for name, value in simulation[room].items():
                    if room == "average" and name.startswith("logit_scale."):
                        value = simulation["parameters"][name]  # the average has the trained model's
                    assert near(got[room][name], value), f"{case}: {room} {name}"
            for name, rows in got["queue"].items():
                if size == 0 or (name == "teacher_image" and not queues_teacher(run_of(case))):
                    assert rows is None
                    continue
                # the ring holds the same rows, the newest of them before the place that is written next
                shift = STEPS * PAIRS % size
                assert rows.shape[0] == size
                assert near(rows.roll(-shift, 0).double(), torch.stack(simulation[name]).double()), f"{case}: {name}"
        start = tiny.objective(run_of(case)).double().model.state_dict()
        moved = max((simulation["average"][n] - v).abs().max() for n, v in start.items() if "logit" not in n)
        assert moved > 0.01, f"{case}: nothing was learned that could differ"
    # what the options change is far above the tolerance
    ends = [simulation["losses"][-1, 1] for simulation in expected.values()]
    assert min((a - b).abs() for i, a in enumerate(ends) for b in ends[:i]) > 1e-4
