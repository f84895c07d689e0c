"""Bytes that travel in a step, by purpose and collective.

Convention: the payload of a collective is the tensor as a whole: what every rank hands to an all-reduce or a
reduce-scatter, what every rank has after an all-gather. By a ring algorithm a rank then sends, and receives,
2 (W-1)/W of it for an all-reduce, and (W-1)/W for the other two. DeepSpeed's ZeRO 1 and 2 all-reduce gradients
(`use_multi_rank_bucket_allreduce`, on by default), although each rank needs its share only.
"""

from __future__ import annotations

from dataclasses import dataclass

from sacl_ds.planning.job import FLOAT, HALF, Job

_ID = 8  # bytes of an id, and of a count of rows
_PARTS = 4  # in which the texts' gradient is sent


@dataclass(frozen=True)
class Transfer:
    """payload: bytes of a step, of the whole tensors. hidden: whether the backward pass can go on meanwhile."""

    purpose: str
    collective: str
    payload: float
    hidden: bool = False

    def sent(self, world: int) -> float:
        """Bytes that a rank sends, and receives, in rings."""
        return (2 if self.collective == "all-reduce" else 1) * (world - 1) / world * self.payload


def transfers(job: Job) -> list[Transfer]:
    """Of one step without logging, records or evaluation; none in one process."""
    if job.world == 1:
        return []
    return [*_engine(job), *_loss(job), *_momentum(job)]


def total(made: list[Transfer], collective: str) -> float:
    """Payload bytes of one collective."""
    return sum(each.payload for each in made if each.collective == collective)


def _engine(job: Job) -> list[Transfer]:
    zero, whole = job.zero, FLOAT * job.parameters
    sent = whole - (FLOAT - HALF) * job.cast
    times = job.reductions
    if zero.stage == 0:
        return [Transfer("gradients", "all-reduce", whole)]
    if zero.stage < 3:
        return [
            Transfer("gradients", "all-reduce", times * sent, hidden=zero.double),
            Transfer("parameters", "all-gather", whole),
        ]
    padded = [(job.world * -(-size // job.world), cast, size) for size, cast in job.sizes]
    gradient = sum(size * (HALF if cast else FLOAT) for size, cast, _ in padded)
    # parameters that always stay whole are gathered once, behind the optimizer's step, in float32
    persistent = sum(FLOAT * size for size, _, own in padded if own <= zero.persistent)
    others = sum(size * (HALF if cast else FLOAT) for size, cast, own in padded if own > zero.persistent)
    forwards = job.parts if job.parts == 1 else 2 * job.parts
    once = job.parameters <= zero.live  # forward leaves them whole for backward
    passes = forwards if once else forwards + job.parts
    return [
        Transfer("gradients", "reduce-scatter", times * gradient, hidden=True),
        Transfer("parameters", "all-gather", passes * others + persistent, hidden=True),
    ]


def _loss(job: Job) -> list[Transfer]:
    settings = job.run
    texts, width = settings.train.global_batch_size, settings.model.embed_dim
    share = -(-job.pairs // _PARTS)
    sums = 5 * (2 if settings.loss.drop_below is not None else 1)  # greatest of two, then sums of three
    made = [
        Transfer("counts of pairs", "all-gather", _ID * job.world),
        Transfer("ids", "all-gather", _ID * texts * job.id_columns),
        Transfer("text features", "all-gather", FLOAT * texts * width),
        Transfer("sums over texts", "all-reduce", FLOAT * texts * sums),
        Transfer("texts' weights", "all-gather", FLOAT * texts),
        Transfer("gradient of texts", "reduce-scatter", FLOAT * job.world * share * _PARTS * width),
    ]
    if job.teacher_width:
        made.append(Transfer("teacher's text features", "all-gather", FLOAT * texts * job.teacher_width))
    means = {"pairings of ITM": settings.loss.matching_weight, "tokens of MLM": settings.loss.mlm_weight}
    for purpose, weight in means.items():
        if weight:
            made.append(Transfer(purpose, "all-reduce", FLOAT))
    return made


def _momentum(job: Job) -> list[Transfer]:
    settings = job.run.momentum
    if not settings.enabled:
        return []
    texts, made = job.run.train.global_batch_size, []
    if job.zero.stage == 3:
        made.append(Transfer("parameters for their average", "all-gather", FLOAT * job.world * job.shard))
    if settings.queue_size:
        width = 2 * (job.run.model.embed_dim + (job.teacher_width if settings.regulate_queue else 0))
        made.append(Transfer("keys for the queue", "all-gather", texts * (FLOAT * width + _ID * job.id_columns)))
    return made
