"""Bytes that a rank holds, by part: what stays between steps, and what a step adds at its two high points.

Parameters, gradients and Adam's two averages are float32, also under autocast, whose bfloat16 copies of the weights
live from forward to backward. The high points are the beginning of backward, where every activation is held and no
gradient yet, and its end, where it is the other way round. What a kernel needs for itself, the caching allocator's
unused blocks (on GPUs often 5 to 10 %) and the context of CUDA and NCCL (1 to 2 GB) come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sacl_ds.planning.job import FLOAT, HALF, Job

_IDS = 8  # bytes of an id
_SUMS = 3 * 8  # of a text: two float64 log-sums and a count
# passes of a pair through the text encoder, captions and masked ones, and through the fusion encoder, ITM's and MLM's
_TEXTS, _FUSIONS = 2, 4
_IMAGES_READ = 4  # pairings for which a pair's image tokens are projected to keys and values
_OFFLOAD_BUFFERS = 2  # of the largest gradient, under ZeRO 2 with offload


@dataclass(frozen=True)
class Memory:
    """Bytes by part. kept: between steps; forward, backward: on top of it, where backward begins and
    where it ends; host: the memory of
    the machine that offloading takes for this rank; disk: what NVMe holds of it."""

    kept: dict[str, float]
    forward: dict[str, float]
    backward: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)

    @property
    def at_rest(self) -> float:
        """Bytes between two steps."""
        return sum(self.kept.values())

    @property
    def peak(self) -> float:
        """Bytes at the higher of the two points."""
        return self.at_rest + max(sum(self.forward.values()), sum(self.backward.values()))


def memory(job: Job) -> Memory:
    """Of one rank of the job, in bytes."""
    zero, whole, shard = job.zero, FLOAT * job.parameters, FLOAT * job.shard
    kept: dict[str, float] = {}
    away: dict[str, float] = {}
    kept["parameters"] = _sharded_parameters(job) if zero.stage == 3 else whole
    if zero.stage == 3 and zero.parameters:
        kept["parameters"] -= shard
        away["parameters"] = shard
    state = away if zero.optimizer else kept
    if zero.stage:
        state["copy of the shard"] = shard
    state["optimizer"] = 2 * shard
    if zero.stage == 3:
        state["gradients"] = 2 * shard if zero.optimizer else shard  # as they were reduced, and for the optimizer
        kept["buckets"] = _bucket(job)
    elif zero.optimizer:
        away["gradients"] = shard
        away["parameters on their way back"] = shard
        largest = max(size for size, _ in job.sizes)
        kept["buckets"] = _OFFLOAD_BUFFERS * FLOAT * largest
    if job.run.momentum.enabled:
        kept["momentum"], kept["queue"] = whole, _queue(job)
    forward = {"activations": activations(job), "loss": loss_bytes(job)}
    if job.autocast and zero.stage < 3:
        forward["bfloat16 weights"] = HALF * job.cast
    backward: dict[str, float] = {}
    if zero.stage == 3 and job.world > 1:  # alone, the shard is whole as it is
        forward["whole parameters"] = backward["whole parameters"] = FLOAT * min(job.parameters, zero.live)
    backward |= _gradients(job)
    if zero.stage in (1, 2):  # made as backward begins
        forward["buckets"] = _bucket(job)
    if job.parts > 1:  # earlier micro-batches have left theirs
        forward |= _accumulated(job)
    host, disk = ({}, away) if zero.optimizer == "nvme" else (away, {})
    return Memory(kept, forward, backward, host, disk)


def activations(job: Job) -> float:
    """Bytes that forward of a micro-batch keeps for backward: `ModelCost.pretraining`, or, with checkpointing, the
    inputs of all blocks and one block as a whole."""
    model, tokens, length = job.run.model, 1 + job.cost.patches, job.cost.text_tokens
    vit, image_width, width = job.cost.model.image_encoder.vit, job.cost.model.image_encoder.width, model.text_width
    size = HALF if job.autocast else FLOAT
    if not job.checkpointed:
        return job.at_once * (size * job.cost.pretraining().kept + (HALF * _autocast_extra(job) if job.autocast else 0))
    inputs = len(vit.blocks) * tokens * image_width
    inputs += (_TEXTS * model.text_layers + _FUSIONS * model.fusion_layers) * length * width
    image_block = job.cost.image(guided=False)[0].kept / len(vit.blocks)
    fusion_layer = _FUSIONS * job.cost.fused(length, tokens).kept / model.fusion_layers
    return job.at_once * (FLOAT * inputs + size * max(image_block, fusion_layer))


def _autocast_extra(job: Job) -> float:
    """bfloat16 numbers a pair on top of half of what float32 keeps: inputs of norms stay float32, and every linear
    layer keeps its own bfloat16 copy of what several of them read."""
    model, tokens, length = job.run.model, 1 + job.cost.patches, job.cost.text_tokens
    encoder, width = job.cost.model.image_encoder, model.text_width
    texts, fusions = _TEXTS * model.text_layers, _FUSIONS * model.fusion_layers
    norms = (2 * len(encoder.vit.blocks) + 1) * tokens * encoder.width + (2 * texts + 3 * fusions) * length * width
    queries_keys_values = 2 * (texts + fusions) * length * width
    return norms + queries_keys_values + 2 * model.fusion_layers * _IMAGES_READ * tokens * encoder.width


def loss_bytes(job: Job) -> float:
    """Bytes of the contrastive loss: features, ids and log-sums of all texts, a share of the texts' gradient."""
    texts = job.run.train.global_batch_size
    width = job.run.model.embed_dim + job.teacher_width
    return texts * (FLOAT * width + _IDS + _SUMS) if job.world > 1 else 0.0


def _gradients(job: Job) -> dict[str, float]:
    """At the end of backward, or of the optimizer's step, whichever holds more."""
    zero, whole, shard = job.zero, FLOAT * job.parameters, FLOAT * job.shard
    if zero.stage == 0:
        return {"gradients": whole, "buckets": FLOAT * min(job.parameters, 500_000_000)}
    if zero.stage == 1 or (job.coalesced and job.parts > 1):
        return {"gradients": whole + shard, "buckets": _bucket(job)}
    if zero.stage == 2:
        return {"gradients": 0 if zero.optimizer else 2 * shard, "buckets": _bucket(job)}
    return {"gradients": FLOAT * min(job.parameters, zero.reduce_bucket)}


def _accumulated(job: Job) -> dict[str, float]:
    if job.zero.stage in (0, 1) or job.coalesced:
        return {"gradients": FLOAT * job.parameters}
    return {"gradients": FLOAT * job.shard if job.zero.stage == 2 and not job.zero.optimizer else 0.0}


def _bucket(job: Job) -> float:
    """Under autocast ZeRO keeps buckets of two kinds, for gradients sent in float32 and in bfloat16; ZeRO 1 and 2 fill
    both in float32, ZeRO 3 each in what is sent."""
    kinds = {cast for _, cast in job.sizes}
    size, times = job.zero.reduce_bucket, 2 if job.zero.double else 1
    if job.zero.stage == 3:
        return sum(size * (HALF if cast else FLOAT) for cast in kinds)
    return times * len(kinds) * FLOAT * size


def _sharded_parameters(job: Job) -> float:
    small = sum(size for size, _ in job.sizes if size <= job.zero.persistent)
    return FLOAT * (job.shard + small)


def _queue(job: Job) -> float:
    settings = job.run.momentum
    teacher = job.teacher_width if settings.regulate_queue else 0
    return settings.queue_size * (2 * FLOAT * (job.run.model.embed_dim + teacher) + _IDS)
