"""Bytes that a step sends, by purpose and collective.

Convention: the payload of a collective is the tensor as a whole: what every rank hands to an all-reduce or a
reduce-scatter, what every rank has after an all-gather. By a ring algorithm a rank then sends, and receives, 2 (W-1)/W
of it for an all-reduce, and (W-1)/W for the other two. DeepSpeed's ZeRO 1 and 2 all-reduce gradients
(`use_multi_rank_bucket_allreduce`, on by default), although each rank needs its share only.
"""

from __future__ import annotations

from dataclasses import dataclass

from scaling.job import FLOAT, HALF, PlannedJob

_ID = 8  # bytes of an id
_PARTS = 4  # in which the texts' gradient is sent


@dataclass(frozen=True)
class Transfer:
    """Transfer of a step. payload: bytes of the whole tensors. hidden: whether backward can go on meanwhile."""

    purpose: str
    collective: str
    payload: float
    hidden: bool = False

    def sent(self, world: int) -> float:
        """Bytes that a rank sends, and receives, in rings."""
        return (2 if self.collective == "all-reduce" else 1) * (world - 1) / world * self.payload


def transfers(job: PlannedJob) -> list[Transfer]:
    """List a step's transfers, without logging, records or evaluation; none in one process."""
    if job.world == 1:
        return []
    of_loss = contrastive_with_keys(job) if job.run.momentum.enabled else contrastive(job)
    return [*_engine(job), *of_loss, *_means(job), *_momentum(job)]


def total(made: list[Transfer], collective: str) -> float:
    """Payload bytes of one collective."""
    return sum(each.payload for each in made if each.collective == collective)


def _engine(job: PlannedJob) -> list[Transfer]:
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
    # parameters that always stay whole are gathered once, after the optimizer's step, in float32
    persistent = sum(FLOAT * _padded(job, size) for size, _ in job.sizes if size <= zero.persistent)
    return [
        Transfer("gradients", "reduce-scatter", times * _sent(job, job.sizes), hidden=True),
        Transfer("parameters", "all-gather", _gathered(job) + persistent, hidden=True),
    ]


def _gathered(job: PlannedJob) -> float:
    """Count the bytes of parameters that ZeRO 3 gathers in a step, without those that stay whole.

    What forward gathers stays until backward is done with it, if there is room; and what the first pass of the first
    micro-batch gathers, until the second pass is. Fetching ahead knows but one order of modules, the second pass's: at
    the end of each first pass it fetches what follows there, for nothing.
    """
    every, late = (
        _sent(job, [each for each in sizes if each[0] > job.zero.persistent]) for sizes in (job.sizes, job.late_sizes)
    )
    once = job.parameters <= job.zero.live
    if job.parts == 1:
        return every if once else 2 * every
    return job.parts * (every + late if once else 3 * every)


def _sent(job: PlannedJob, sizes: list[tuple[int, bool]]) -> float:
    return sum(_padded(job, size) * (HALF if cast else FLOAT) for size, cast in sizes)


def _padded(job: PlannedJob, size: int) -> int:
    """Round up to equal shares of all ranks."""
    return job.world * -(-size // job.world)


def contrastive(job: PlannedJob) -> list[Transfer]:
    """List the transfers of the contrastive loss and its gradient: texts travel, images stay."""
    settings = job.run
    texts, width = settings.train.global_batch_size, settings.model.embed_dim
    share = -(-job.pairs // _PARTS)
    sums = 5 * (2 if settings.loss.drop_below is not None else 1)  # greatest of two, then sums of three
    made = [
        Transfer("ids", "all-gather", _ID * (texts + job.world) * job.id_columns),  # and a row of settings a rank
        Transfer("text features", "all-gather", FLOAT * texts * width),
        Transfer("sums over texts", "all-reduce", FLOAT * texts * sums),
        Transfer("texts' weights", "all-gather", FLOAT * texts),
        Transfer("gradient of texts", "reduce-scatter", FLOAT * job.world * share * _PARTS * width),
    ]
    if job.teacher_width:
        made.append(Transfer("teacher's text features", "all-gather", FLOAT * texts * job.teacher_width))
    return made


def contrastive_with_keys(job: PlannedJob) -> list[Transfer]:
    """List the transfers of the loss against a momentum model's keys: both sides' keys travel, no gradient returns."""
    texts = job.run.train.global_batch_size
    return [
        Transfer("ids", "all-gather", _ID * (texts + job.world) * job.id_columns),  # and a row of settings a rank
        Transfer("keys", "all-gather", 2 * FLOAT * texts * job.run.model.embed_dim),
        Transfer("teacher's features", "all-gather", 2 * FLOAT * texts * job.teacher_width),
    ]


def _means(job: PlannedJob) -> list[Transfer]:
    """List the transfers of ITM's and MLM's counts, and of the temperature's gradient."""
    counts = FLOAT * (len(job.run.losses) - 1) if job.parts == 1 else 2 * _ID
    return [
        Transfer("counts of ITM and MLM", "all-reduce", counts),
        Transfer("gradient of the temperature", "all-reduce", FLOAT * job.parts),
    ]


def _momentum(job: PlannedJob) -> list[Transfer]:
    settings = job.run.momentum
    if not settings.enabled:
        return []
    texts, made = job.run.train.global_batch_size, []
    if job.zero.stage == 3:
        cut = [size for size, _ in job.sizes + job.untrained_sizes if size > job.zero.persistent]
        made.append(Transfer("parameters for their average", "all-gather", FLOAT * sum(_padded(job, n) for n in cut)))
    if settings.queue_size:
        width = 2 * (job.run.model.embed_dim + (job.teacher_width if settings.regulate_queue else 0))
        made.append(Transfer("keys for the queue", "all-gather", texts * (FLOAT * width + _ID * job.id_columns)))
    return made
