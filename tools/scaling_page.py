"""Page docs/lab/scaling.md: `python tools/scaling_page.py FILE` writes it; without FILE, stdout.

It is made of the formulas, and of docs/lab/scaling_measured.json, which `tools/measure_scaling.py` gave.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from scaling.case import ROOT
from scaling.checking import COLLECTIVES, HELD, Compared, table, worst
from scaling.job import PlannedJob, Zero
from scaling.memory import memory
from scaling.record import read_record
from scaling.time import H100, hours, step_time
from scaling.wire import transfers

from sacl_ds.config import RunConfig
from sacl_ds.config_file import load_config
from sacl_ds.ds_config import read_ds_config

_MEASURED = ROOT / "docs/lab/scaling_measured.json"
_WORLDS = {8: 4096, 64: 16384, 512: 32768}
_STAGES = (0, 1, 2, 3)
_ADVISED = 2
_TOTAL = 100e6
_TEACHER = 256
_AT_ONCE = 256  # pairs that a GPU passes through the model
_ROOM = 80e9  # bytes of an H100
_ROAD = {1: 512, 8: 2048, 32: 8192, 128: 16384}  # GPUs -> global batch
_BETWEEN = 600  # seconds between checkpoints
_ADAM = 16  # bytes a parameter: weight, gradient, two averages
_SAVED = 12  # bytes a parameter in a checkpoint: weights and two moments, fp32

_PAGE = """# Scaling: memory, traffic, time

Made by `python tools/scaling_page.py docs/lab/scaling.md` (in `make docs`) from the formulas in `tools/scaling/`
and from what `tools/measure_scaling.py` measured; do not edit. **No figure on this page is from a GPU**: what is
measured was measured on CPUs over gloo, and the tables for H100s are computed from assumptions that are named.

## What fills a rank's memory

P parameters that are trained, W ranks, b pairs a rank at once; everything float32 but what autocast computes. Parts
that no loss reaches (the fusion encoder of ITC alone) take 4 bytes a number, 4/W at ZeRO 3, and nothing else.

| part | ZeRO 0 | 1 and 2 | 3 |
| --- | --- | --- | --- |
| parameters | 4P | 4P | 4P/W, and small ones whole |
| copy that the optimizer changes | | 4P/W | 4P/W |
| Adam's two averages | 8P | 8P/W | 8P/W |
| gradients | 4P | 1: 4P + 4P/W; 2: up to 8P/W, at the end (K > 1: 12P/W) | 4P/W, and 4B while they are made |
| buckets, B = `reduce_bucket_size` | 4P | 4B; twice with `overlap_comm`, twice with bf16 | 4B, with bf16 6B |
| whole parameters in a step | | | 4 × min(P, `stage3_max_live_parameters`) |
| activations | b × `ModelCost.pretraining().bytes` | same | same |
| gradients of earlier micro-batches | 4P | 1: 4P; 2: 4P/W | |
| bf16: casts of the weights | 2P' | 2P' | |
| loss: texts of all ranks | N (4 (d + d_t) + 32) | same | same |

P' are the weights of linear layers and convolutions; N pairs in the global batch, d and d_t the features' widths. With
bf16 activations take about half, more where norms keep float32. With K micro-batches (`train.micro_batch_size`) b is
one of them, and earlier ones have left gradients, which `train.coalesce_reduction` keeps whole, 4P, at every stage.
With checkpointing activations are inputs of blocks, and in backward one block as a whole. **ZeRO 3 as shipped saves no
parameters within a step**: DeepSpeed keeps up to 10⁹ whole from forward to backward, more than `base` has, and in
return gathers them once instead of twice; `stage3_max_live_parameters` and `stage3_max_reuse_distance` change that.

## What travels

Payload: the whole tensor of a collective. In a ring a rank sends 2 (W-1)/W of an all-reduce's, (W-1)/W of the others'.
K micro-batches a step.

| what | ZeRO 0 | 1 | 2 | 3 |
| --- | --- | --- | --- | --- |
| gradients | all-reduce 4P | all-reduce 4P | all-reduce 4P × K | reduce-scatter 4P × K |
| parameters | | all-gather 4P | all-gather 4P | all-gather 4P; K > 1: K (4P + 4P'') |
| texts, teacher's texts, ids | all-gather N (4d + 4d_t + 16 + 4) | same | same | same |
| sums over texts | all-reduce 20 N | same | same | same |
| gradient of texts | reduce-scatter 4 N d | same | same | same |

Under bf16 DeepSpeed sends gradients of P' (and, at ZeRO 3, these parameters) in two bytes; ZeRO 0 sends float32. ZeRO
1 and 2 all-reduce although a rank needs its part only (`use_multi_rank_bucket_allreduce`). Pixels never travel.
P'' are the parameters of fusion encoder and heads: at the end of every first pass of a micro-batch ZeRO 3 fetches them
ahead, for nothing. For gradients, `train.coalesce_reduction` makes K = 1.

With `momentum.enabled` every rank keeps the averaged model whole, 4P more, and the queue. Its keys carry no gradient:
those of both sides are gathered, N (8d + 8d_t + 16), in place of texts, sums and the texts' gradient, once more for the
queue, and at ZeRO 3 all parameters once more for their average. A teacher that runs beside the training adds its own
weights and forward pass; the tables are without one.

## Measured beside the formulas

MB of a rank, and measured / formula: at rest between steps, what forward adds (of the last micro-batch), the peak of a
step; payload a step. {million} million parameters, {pairs} pairs a rank, buckets of 400,000 (shipped: 50 million). By
PyTorch's allocator, live tensors and dispatcher, not by formulas. Offload on a CPU is the same memory, and counts.

{measured}
Greatest deviation: memory {worst_memory}, traffic {worst_wire}. Corrected after measuring, by DeepSpeed's source or a
trace of the step: buckets are made as backward begins, and at ZeRO 1 stay through all micro-batches; two kinds of them
under bf16; copies of a rank's share of gradients; bfloat16 copies that linear layers keep; P''. ITC alone, and bf16 in
micro-batches, were measured when the formulas were done, and nothing had to be corrected. In the formulas, but not
measured: a momentum model's memory (its loss's traffic is, in `tests/planning/test_planning.py`), dropout, fp16,
`stage3_max_live_parameters` below the model's size, checkpointing at ZeRO 3, NVMe, GPUs.

```
measure="python tools/measure_scaling.py --docs docs/lab/scaling_measured.json"  # then: make docs
$measure --worlds 1 2 4
$measure --worlds 2 --stages 2 3 --offload
$measure --worlds 2 --precision bf16
$measure --worlds 2 --precision bf16 --stages 1 2 3 --micro-batches 4
$measure --worlds 2 --itc
$measure --worlds 2 --stages 1 2 3 --micro-batches 4            # and again with --coalesce
$measure --worlds 2 --stages 2 --checkpoint                     # and again with --worlds 1 --pairs 96
```

## ZeRO 3 where one rank's memory is too small

![resident memory by rank and time](offload.png)

`python tools/show_offload.py --docs docs/lab/scaling_measured.json`: {shown} million parameters, for which Adam in
float32 needs {needed:.2f} GiB with weights and gradients; the kernel lets each rank have {limit} GiB above what the
libraries take. ZeRO 3 runs here with `stage3_max_live_parameters` of 4 million. On a CPU offloading moves nothing: it
shows that it trains.

{offload}

## base at 256 px on H100s, computed

Precision bf16, {tokens} tokens a caption, a teacher's features computed beforehand (d_t = {teacher}), the shipped
`ds_configs/`. GB a GPU; sent: GB a GPU and step in rings. Hours to 100 million pairs: less if all transfers that
backward can cover are covered, more if none is. **Assumed, not measured**: {share:.0f} % of {peak:.0f} TFLOP/s is
reached, {inside:.0f} GB/s within a node of {node}, {outside:.0f} GB/s between nodes; data never waits.

{worked}

`base` fits an H100 at every stage; **ZeRO {advised} is advised**, for its gradients travel during backward, and with
micro-batches ZeRO 1, which reduces them once a step (or `train.coalesce_reduction`). 3 pays only when parameters and
optimizer no longer fit, or to offload. Pass fewer pairs at once, or checkpoint, first: activations are the most of it.

## From one GPU to 128

`base` at 256 px as above; computed, with what `launch/configs/sacl.yaml` has at batch {first_batch} as the first row.
Peak in GB; a step in seconds, transfers covered or not. Momentum and queue, which that file turns on, come on top:
another 4P = {momentum:.1f} GB a GPU and a forward pass.

{road}

A GPU then takes {rate:.0f} pairs/s, and a checkpoint {saved:.1f} GB of the shared disk. What each column does and
what else to change: [running.md](../running.md#from-one-gpu-to-128).
"""


def page(measured: dict[str, Any]) -> str:
    """Return the text of docs/lab/scaling.md. measured: as `scaling.record` describes it."""
    job, rows, limited = _job(8, _ADVISED), [Compared.of(row) for row in measured["rows"]], measured["limited"]
    return _PAGE.format(
        million=f"{rows[0].case.job.parameters / 1e6:.1f}",
        pairs=rows[0].case.pairs,
        measured=table(rows),
        worst_memory=f"{100 * worst(rows, HELD):.0f} %",
        worst_wire=f"{100 * worst(rows, COLLECTIVES):.0f} %",
        shown=round(limited["parameters"] / 1e6),
        needed=_ADAM * limited["parameters"] / 2**30,
        limit=limited["limit"],
        offload="\n".join(f"* {line}" for line in limited["arms"]),
        worked="\n".join(_worked()),
        tokens=job.cost.text_tokens,
        teacher=_TEACHER,
        advised=_ADVISED,
        share=100 * H100.share,
        peak=H100.flops / 1e12,
        inside=H100.inside / 1e9,
        outside=H100.outside / 1e9,
        node=H100.node,
        first_batch=_ROAD[1],
        road="\n".join(_road()),
        momentum=4 * job.parameters / 1e9,
        saved=_SAVED * job.parameters / 1e9,
        rate=job.pairs / step_time(job, H100).least,
    )


def _job(world: int, stage: int, batch: int | None = None) -> PlannedJob:
    """Make a job of the page. batch: None for that of `_WORLDS`."""
    batch = batch or _WORLDS[world]
    micro = _AT_ONCE if batch // world > _AT_ONCE else None
    train = {"global_batch_size": batch, "precision": "bf16", "micro_batch_size": micro}
    run = RunConfig.model_validate({"model": {"preset": "base"}, "train": train})
    ds = read_ds_config(ROOT / f"ds_configs/zero{stage}.json") if stage else {}
    return PlannedJob(run, world, Zero.of(ds), teacher_width=_TEACHER)


def _worked() -> list[str]:
    head = ["GPUs, batch", "pairs a GPU, at once", "ZeRO", "at rest", "activations", "peak", "fits 80 GB"]
    head += ["sent", "compute s", "hours to 100M"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * 3}{' ---: |' * 3} --- |{' ---: |' * 3}"]
    for world, batch in _WORLDS.items():
        for stage in _STAGES:
            job = _job(world, stage)
            found, took = memory(job), step_time(job, H100)
            fewest, most = hours(job, H100, _TOTAL)
            sent = sum(each.sent(world) for each in transfers(job))
            figures = [f"{size / 1e9:.1f}" for size in (found.at_rest, found.forward["activations"], found.peak)]
            cells = [f"{world}, {batch}", f"{job.pairs}, {job.at_once}", str(stage), *figures]
            cells += ["yes" if found.peak < 0.9 * _ROOM else "no", f"{sent / 1e9:.2f}", f"{took.compute:.2f}"]
            lines.append(f"| {' | '.join([*cells, f'{fewest:.2f} to {most:.2f}'])} |")
    return lines


def _road() -> list[str]:
    """List the settings from one GPU to many, a row for each number of them."""
    first = load_config(str(ROOT / "launch/configs/sacl.yaml"), [])
    assert first.train.global_batch_size == _ROAD[1]
    head = ["GPUs", "`global_batch_size`", "pairs a GPU, at once", "`lr_image`, `lr_text`", "`warmup_steps`", "`steps`"]
    head += ["ZeRO", "peak", "a step", "`save_every`, ten minutes"]
    lines = [f"| {' | '.join(head)} |", f"|{' ---: |' * len(head)}"]
    for world, batch in _ROAD.items():
        stage = 1 if batch // world > _AT_ONCE else _ADVISED
        job, factor = _job(world, stage, batch), math.sqrt(batch / _ROAD[1])
        took = step_time(job, H100)
        rates = f"{first.optim.lr_image * factor:.1e}, {first.optim.lr_text * factor:.1e}"
        steps = round(first.train.steps * _ROAD[1] / batch, -2)
        cells = [str(world), str(batch), f"{job.pairs}, {job.at_once}", rates]
        warmup = min(first.optim.warmup_steps * factor, steps / 10)
        cells += [str(round(warmup, -2)), str(steps), str(stage)]
        cells += [f"{memory(job).peak / 1e9:.0f}", f"{took.least:.2f} to {took.most:.2f}"]
        lines.append(f"| {' | '.join([*cells, str(round(_BETWEEN / took.most, -2))])} |")
    return [line.replace(".0 |", " |") for line in lines]


if __name__ == "__main__":
    made = page(read_record(_MEASURED))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(made)
    else:
        print(made, end="")
