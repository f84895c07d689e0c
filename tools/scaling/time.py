"""Estimate of a step's time from assumed rates, which are inputs and no measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sacl_ds.model.cost import BACKWARD
from scaling.job import PlannedJob
from scaling.wire import transfers

_CHECKPOINTED = 1  # forwards more, for the activations computed again
# FLOPs a pair of pairs and dimension, forward and backward, and half as many a dimension of the teacher: of one matrix
# for both directions, and of one for each against a momentum model's keys
_LOSS, _KEYS = 8, 12


@dataclass(frozen=True)
class Rates:
    """Assumed rates of the hardware.

    flops: peak a GPU and second, dense; share: of it that is reached (MFU); inside, outside: bytes a GPU sends a second
    within its node and to other nodes; node: GPUs of one.
    """

    flops: float
    share: float
    inside: float
    outside: float
    node: int = 8


# an H100 SXM by NVIDIA's data sheet: 989 TFLOP/s dense bfloat16, NVLink 450 GB/s a direction; a 400 Gbit/s network port
# a GPU. Of the links 80 % are taken to be reached, of the FLOPs 40 %.
H100 = Rates(flops=989e12, share=0.4, inside=0.8 * 450e9, outside=0.8 * 50e9)


@dataclass(frozen=True)
class StepTime:
    """Time of a step in seconds.

    compute: of the model and the loss, backward: the part of it that its backward passes are; hidden: transfers that
    these can cover; open: others.
    """

    compute: float
    backward: float
    hidden: float
    open: float

    @property
    def least(self) -> float:
        """Seconds of a step if every transfer that can overlap does."""
        return self.compute - self.backward + max(self.backward, self.hidden) + self.open

    @property
    def most(self) -> float:
        """Seconds of a step if no transfer overlaps."""
        return self.compute + self.hidden + self.open


def step_flops(job: PlannedJob) -> float:
    """Count a rank's FLOPs in a step.

    Forward and backward of its pairs, both encoders' forward once more with micro-batches, forward of a momentum model,
    and the batch's similarities.
    """
    features = job.cost.pretraining(("itc",)).flops
    a_pair = job.pair.flops + backward_flops(job) / job.pairs
    if job.parts > 1:
        a_pair += features
    width, rivals, a_rival = job.run.model.embed_dim + job.teacher_width / 2, job.run.train.global_batch_size, _LOSS
    momentum = job.run.momentum
    if momentum.enabled:
        predicts = momentum.distill_weight and "mlm" in job.run.losses
        a_pair += job.cost.pretraining(("itc", "mlm")).flops if predicts else features
        if predicts and job.parts > 1:  # its masked tokens are predicted in the second pass
            a_pair += features
        rivals, a_rival = rivals + momentum.queue_size, _KEYS
    return job.pairs * (a_pair + a_rival * rivals * width)


def backward_flops(job: PlannedJob) -> float:
    """Count the part of `step_flops` that the model's backward passes take."""
    return job.pairs * (BACKWARD - 1 + (_CHECKPOINTED if job.checkpointed else 0)) * job.pair.flops


def step_time(job: PlannedJob, rates: Rates) -> StepTime:
    """Estimate a step's time. Rings run at their slowest link, the network's as soon as there are several nodes."""
    speed = rates.inside if job.world <= rates.node else rates.outside
    made = transfers(job)
    hidden, rest = (sum(each.sent(job.world) for each in made if each.hidden is kind) / speed for kind in (True, False))
    reached = rates.flops * rates.share
    return StepTime(step_flops(job) / reached, backward_flops(job) / reached, hidden, rest)


def hours(job: PlannedJob, rates: Rates, pairs: float) -> tuple[float, float]:
    """Return the hours to see so many pairs, with all possible overlap and with none. Data never waits."""
    steps, each = math.ceil(pairs / job.run.train.global_batch_size), step_time(job, rates)
    return steps * each.least / 3600, steps * each.most / 3600
