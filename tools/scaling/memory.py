"""Memory of a rank in bytes, by part: what stays between steps, and what a step adds at its two high points.

Parameters, gradients and Adam's two averages are float32, also under autocast, whose bfloat16 copies of the weights
live from forward to backward. The high points are the beginning of backward, where every activation is held and no
gradient yet, and its end, where it is the other way round. What a kernel needs for itself, the caching allocator's
unused blocks (on GPUs often 5 to 10 %) and the context of CUDA and NCCL (1 to 2 GB) come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sacl_ds.errors import UserError
from sacl_ds.model.cost import PAIRINGS
from scaling.job import FLOAT, HALF, PlannedJob

_IDS = 8  # bytes of an id
_SUMS = 3 * 8  # of a text: two float64 log-sums and a count
_COLOURS = 3
_OFFLOAD_BUFFERS = 2  # of the largest gradient, under ZeRO 2 with offload


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    kept: between steps; forward, backward: on top of it, where backward begins and where it ends; host: the memory of
    the machine that offloading takes for this rank; disk: what NVMe holds of it.
    """

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


def memory(job: PlannedJob) -> Memory:
    """Estimate the memory of one rank of the job, in bytes."""
    zero, whole, shard = job.zero, FLOAT * job.parameters, FLOAT * job.shard
    kept: dict[str, float] = {}
    away: dict[str, float] = {}
    kept["parameters"] = _sharded_parameters(job) if zero.stage == 3 else whole
    if zero.stage == 3 and zero.parameters:
        kept["parameters"] -= shard
        away["parameters"] = shard
    kept["parameters that are not trained"] = _untrained(job)
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
        kept["momentum"] = whole + FLOAT * sum(size for size, _ in job.untrained_sizes)
        kept["queue"] = _queue(job)
    forward = {"activations": activations(job), "loss": loss_bytes(job)}
    if job.autocast and zero.stage < 3:
        forward["bfloat16 weights"] = HALF * job.cast
    if zero.stage == 3:
        forward["whole parameters"] = _whole_parameters(job)
    if zero.stage in (1, 2) and job.reduced_in_backward:
        early = zero.stage == 1 and job.parts > 1
        forward["buckets since the first micro-batch" if early else "buckets"] = _bucket(job)
    if zero.stage == 2 and job.reduced_in_backward and not zero.optimizer:  # with the first gradient, for all
        forward["gradients of the share"] = shard
    if job.checkpointed:
        forward["block computed again"] = computed_again(job)
    if job.parts > 1:
        forward |= _accumulated(job)
    host, disk = ({}, away) if zero.optimizer == "nvme" else (away, {})
    return Memory(kept, forward, _gradients(job), host, disk)


def activations(job: PlannedJob) -> float:
    """Estimate the bytes that forward of a micro-batch keeps for backward: `ModelCost.pretraining`.

    With checkpointing only the inputs of all encoders' blocks are kept, in float32 also under autocast.
    """
    numbers, extra = job.pair.kept, _autocast_extra(job) if job.autocast else 0.0
    inputs = 0.0
    if job.checkpointed:
        if job.cost.model.image_encoder.layers:
            raise UserError(
                "what model.patch_selection needs with train.checkpoint_activations is not known; set its placement "
                "to none, or checkpoint_activations to false"
            )
        blocks = _blocks(job)
        numbers -= sum(each.kept for each in blocks)
        extra -= sum(each.extra for each in blocks) if job.autocast else 0
        inputs = sum(each.input for each in blocks)
    size = HALF if job.autocast else FLOAT
    return job.at_once * (size * numbers + HALF * extra + FLOAT * inputs)


def computed_again(job: PlannedJob) -> float:
    """Estimate the bytes of the largest block, which backward holds as a whole with checkpointing."""
    size = HALF if job.autocast else FLOAT
    most = max(size * each.kept + (HALF * each.extra if job.autocast else 0) for each in _blocks(job))
    return job.at_once * most if job.checkpointed else 0.0


class _Block(NamedTuple):
    """Numbers a pair. input: what goes in; kept: by `ModelCost`; extra: see `_autocast_extra`."""

    input: float
    kept: float
    extra: float


def _blocks(job: PlannedJob) -> list[_Block]:
    """Sizes of the transformer blocks without patch selection: image encoder, text encoder, fusion encoder.

    The text encoder takes captions and masked ones, the fusion encoder all texts of ITM and MLM.
    """
    cost, model = job.cost, job.run.model
    matching, words = "itm" in job.run.losses, "mlm" in job.run.losses
    texts, fusions = 1 + words, PAIRINGS * matching + words
    encoder, length, width = cost.model.image_encoder, cost.text_tokens, model.text_width
    image, text = cost.image(guided=False)[0], cost.text()
    tokens, image_width = 1 + cost.patches, encoder.width
    whole = image.kept - _COLOURS * model.image_size**2 - tokens * (2 * image_width + 2)  # pixels, the last norm
    depth = len(encoder.vit.blocks)
    read = text.kept - length * (width + 2)  # after the embeddings
    state = length * width
    # inputs of norms, two or three a block; of queries, keys and values of a text, and keys and values of the image
    of_image = _Block(tokens * image_width, whole / depth, 2 * tokens * image_width)
    of_text = _Block(texts * state, texts * read / model.text_layers, (2 + 2) * texts * state)
    encoders = [of_image] * depth + [of_text] * model.text_layers
    if not fusions:
        return encoders
    fused = cost.fused_together(length, tokens, fusions, elsewhere=int(matching))
    of_both = _Block(
        fusions * state, fused.kept / model.fusion_layers, (3 + 2) * fusions * state + 2 * tokens * image_width
    )
    return encoders + [of_both] * model.fusion_layers


def _autocast_extra(job: PlannedJob) -> float:
    """Count the bfloat16 numbers a pair that autocast adds to half of what float32 keeps.

    Inputs of norms stay float32, and every linear layer keeps its own bfloat16 copy of what several of them read.
    """
    last_norm = (1 + job.cost.patches) * job.cost.model.image_encoder.width
    return sum(each.extra for each in _blocks(job)) + last_norm


def loss_bytes(job: PlannedJob) -> float:
    """Estimate the bytes of the contrastive loss: features, ids and log-sums of all texts, part of their gradient."""
    texts = job.run.train.global_batch_size
    width = job.run.model.embed_dim + job.teacher_width
    return texts * (FLOAT * width + _IDS + _SUMS) if job.world > 1 else 0.0


def _gradients(job: PlannedJob) -> dict[str, float]:
    """Memory at the end of backward or in the optimizer's step, whichever is more."""
    zero, whole, shard = job.zero, FLOAT * job.parameters, FLOAT * job.shard
    if zero.stage == 0:
        return {"gradients": whole, "buckets": FLOAT * min(job.parameters, 500_000_000)}
    if zero.stage == 3:
        made = FLOAT * min(job.parameters, zero.reduce_bucket)
        if job.reduced_in_backward:
            return {"whole parameters": _whole_parameters(job), "gradients": made}
        return {"gradients": whole + made}
    if zero.stage == 1 or not job.reduced_in_backward:
        return {"gradients": whole + shard, "buckets": _bucket(job)}
    copies = 2 if job.parts == 1 else 3  # of the share, as it was reduced, for the optimizer, and added up before
    return {"gradients": 0 if zero.optimizer else copies * shard, "buckets": _bucket(job)}


def _whole_parameters(job: PlannedJob) -> float:
    """Memory of the parameters that ZeRO-3 has gathered; 0 on one rank, where the shard is everything."""
    return FLOAT * min(job.parameters, job.zero.live) if job.world > 1 else 0.0


def _accumulated(job: PlannedJob) -> dict[str, float]:
    """Bytes of gradients that earlier micro-batches have left."""
    if job.zero.stage < 2 or not job.reduced_in_backward:
        return {"gradients": FLOAT * job.parameters}
    return {"gradients": FLOAT * job.shard if job.zero.stage == 2 and not job.zero.optimizer else 0.0}


def _bucket(job: PlannedJob) -> float:
    """Bytes of the reduction buckets, of two kinds under autocast: gradients sent in float32 and in bfloat16.

    ZeRO 1 and 2 fill both in float32, ZeRO 3 each in what is sent.
    """
    kinds = {cast for _, cast in job.sizes}
    size, times = job.zero.reduce_bucket, 2 if job.zero.double else 1
    if job.zero.stage == 3:
        return sum(size * (HALF if cast else FLOAT) for cast in kinds)
    return times * len(kinds) * FLOAT * size


def _sharded_parameters(job: PlannedJob) -> float:
    small = sum(size for size, _ in job.sizes if size <= job.zero.persistent)
    return FLOAT * (job.shard + small)


def _untrained(job: PlannedJob) -> float:
    """Bytes of parameters that are not trained; ZeRO 1 and 2 leave them whole."""
    sizes = job.untrained_sizes
    if job.zero.stage < 3:
        return FLOAT * sum(size for size, _ in sizes)
    return FLOAT * (job.cut(sizes) + sum(size for size, _ in sizes if size <= job.zero.persistent))


def _queue(job: PlannedJob) -> float:
    settings = job.run.momentum
    teacher = job.teacher_width if settings.regulate_queue else 0
    return settings.queue_size * (2 * FLOAT * (job.run.model.embed_dim + teacher) + _IDS)
