"""Memory and traffic of real steps on 1 to 4 ranks, at ZeRO 0 to 3, beside the formulas of `tools/scaling/`.

Every case is a job of fresh processes over gloo, on the CPU: the model is built, DeepSpeed started as in ds_configs/
(with smaller buckets, since the model is), and three steps are made as pre-training makes them. What a step sends is
read from PyTorch's dispatcher, what it holds from PyTorch's allocator and Python's list of tensors: none of these knows
the formulas. Options name the cases; each is done with all of --offload, --micro-batches, --coalesce and --checkpoint
that are given. Prints a row of the table for each, and puts it in the file that docs/lab/scaling.md is made of.

example: python tools/measure_scaling.py --worlds 2 --stages 2 3 --micro-batches 4 --docs docs/lab/scaling_measured.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from scaling.case import LENGTH, PAIRS, PREDICTED, SIZES, TEACHER, VOCABULARY, Case
from scaling.checking import Compared, row_of
from scaling.ranks import on_ranks
from scaling.record import record_row
from scaling.watch import SeenOnTheWire, allocations, live_tensors, storage_bytes

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config.room import user_path
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.ds_config import resolve
from sacl_ds.errors import UserError
from sacl_ds.machine import this_machine
from sacl_ds.model.sacl import SaclModel
from sacl_ds.training.engine import build_engine, prepare_model, start_process
from sacl_ds.training.objective import PretrainObjective
from sacl_ds.training.step import Step, contrastive_step

STEPS = 3


def batch(case: Case, rank: int) -> Batch:
    """Random pixels and captions of one length, and a teacher's features."""
    g, pairs, size = torch.Generator().manual_seed(rank), case.pairs, case.run.model.image_size
    ids = torch.randint(5, VOCABULARY, (pairs, LENGTH), generator=g)
    masked = (torch.arange(LENGTH) < PREDICTED).expand(pairs, -1)
    teacher = torch.nn.functional.normalize(torch.randn(pairs, 2, TEACHER, generator=g), dim=2)
    return Batch(
        keys=[""] * pairs, captions=[""] * pairs, shards=[""] * pairs,
        images=torch.randint(0, 256, (pairs, 3, size, size), generator=g, dtype=torch.uint8),
        input_ids=ids, attention_mask=torch.ones_like(ids),
        pair_ids=(rank * pairs + torch.arange(pairs))[:, None].expand(-1, 2).contiguous(),
        masked_ids=ids.masked_fill(masked, 4), mlm_labels=ids.masked_fill(~masked, IGNORED),
        teacher_features=teacher.half(),
    )  # fmt: skip


def built(case: Case) -> DeepSpeedEngine:
    """The engine of pre-training."""
    run = case.run
    settings = resolve(case.ds, run, case.world, this_machine("cpu"))
    torch.manual_seed(run.seed)
    model = SaclModel(run.model, VOCABULARY, pretrained=False)
    prepare_model(model, run, settings)
    return build_engine(PretrainObjective(model, run.loss), settings, run.optim)


def measured(case: Case, rank: int) -> dict[str, Any]:
    """Of this rank: bytes at rest, where backward begins (of the last micro-batch) and at the peak, by part where parts
    can be told apart, and the payload bytes of the collectives. The process must not have built an engine before."""
    data, generator = batch(case, rank), torch.Generator().manual_seed(rank)
    rows = case.run.micro_batches(case.world)[0]
    step = Step(0, rank, generator, torch.device("cpu"), rows, case.coalesced, alpha=0.5)
    engine: Any = None

    def one_step(mark: Callable[[str], None]) -> None:
        backward = engine.backward

        def marked(loss: torch.Tensor) -> None:
            mark("forward")
            backward(loss)

        engine.backward = marked
        contrastive_step(engine, data, step)
        engine.backward = backward
        engine.step()
        gc.collect()

    def build_and_step(mark: Callable[[str], None]) -> None:
        nonlocal engine
        engine = built(case)
        for _ in range(STEPS):
            gc.collect()
            mark("rest")
            one_step(mark)
        mark("end")

    before = live_tensors()
    held = allocations(build_and_step)
    rest = sum(size for storage, size in live_tensors().items() if storage not in before)
    wire = SeenOnTheWire()
    with wire:
        one_step(lambda name: None)
    own = list(engine.module.parameters())
    whole = [p.data for p in own if getattr(p, "ds_persist", True)]
    shards = [p.ds_tensor for p in own if hasattr(p, "ds_tensor")]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = [value for each in inner.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return {
        "parameters": storage_bytes([*whole, *shards]),
        "optimizer": storage_bytes(value for value in state if value.ndim),
        "at rest": rest,
        "forward": held.at("forward") - held.at("rest"),
        "peak": rest + held.peak("rest", "end") - held.at("rest"),
        "wire": {collective: wire.total(collective) for collective in ("all-reduce", "all-gather", "reduce-scatter")},
    }


def rank_of(rank: int, case: Case) -> dict[str, Any]:
    """One rank's process."""
    start_process()
    torch.set_num_threads(1)
    found = measured(case, rank)
    dist.barrier()
    dist.destroy_process_group()
    return found


def cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(
            options.size,
            options.pairs,
            world,
            stage,
            options.precision,
            offload=options.offload,
            micro_batches=count,
            coalesced=options.coalesce,
            checkpointed=options.checkpoint,
            itc_alone=options.itc,
        )
        for count, world, stage in itertools.product(options.micro_batches, options.worlds, options.stages)
    ]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="middle", help="of the model (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="a rank (default: %(default)s)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="ranks (default: 1 2 4)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="of ZeRO")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="default: %(default)s")
    parser.add_argument("--offload", action="store_true", help="with what ds_configs/ offloads to the CPU: ZeRO 2, 3")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1], help="of a step (default: 1)")
    parser.add_argument("--coalesce", action="store_true", help="their gradients reduced together, not one by one")
    parser.add_argument("--checkpoint", action="store_true", help="with checkpointing of activations")
    parser.add_argument("--itc", action="store_true", help="without ITM and MLM")
    parser.add_argument("--docs", type=user_path, required=True, help="JSON file; rows of the same cases are replaced")
    options = parser.parse_args()
    if options.offload and min(options.stages) < 2:
        raise UserError("--offload: only ZeRO 2 and 3 offload; add --stages 2 3")
    for count in options.micro_batches:
        if count < 1 or options.pairs % count:
            raise UserError(f"--micro-batches {count}: no divisor of --pairs {options.pairs}; take one")
    for case in cases(options):
        ranks = on_ranks(case.world, rank_of, case)
        if None in ranks:
            raise RuntimeError(f"{case}: a rank ended without a result; see above")
        row = row_of(case, ranks)
        print(Compared.of(row).row, flush=True)
        record_row(options.docs, row)


if __name__ == "__main__":
    sys.exit(exit_status(main))
