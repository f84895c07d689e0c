"""A model whose optimizer state is too large for what a rank may use, trained all the same by ZeRO 3.

Every rank gets the same limit (RLIMIT_DATA, on top of what the libraries take before there is a model); the kernel
refuses what is beyond. One rank without ZeRO runs out of memory; four with ZeRO 3 stay within, also with the optimizer
and the parameters offloaded, which on a CPU means the same memory and shows that it works, not that it saves. Puts a
line for each in the file that docs/lab/scaling.md is made of, and a picture beside it, offload.png: resident memory
over time, by rank.

example: python tools/show_offload.py --docs docs/lab/scaling_measured.json
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling.job import PlannedJob, Zero
from scaling.ranks import on_ranks
from scaling.record import record_limited

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config import RunConfig
from sacl_ds.config.room import user_path
from sacl_ds.data.batch import Batch
from sacl_ds.data.text import IGNORED
from sacl_ds.ds_config import read_ds_config, resolve
from sacl_ds.machine import this_machine

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LENGTH, PAIRS = 4000, 12, 4
MODEL = {
    "image_encoder_arguments": {"embed_dim": 640, "depth": 8, "num_heads": 8, "patch_size": 16},
    "image_size": 64, "text_width": 640, "text_heads": 8, "text_layers": 2, "fusion_layers": 2, "embed_dim": 128,
    "max_tokens": LENGTH, "vocab_size": VOCABULARY,
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    name: str
    world: int
    ds: str | None
    limit: float  # GiB
    steps: int


def run_of(arm: Arm) -> RunConfig:
    optim = {"lr_image": 2e-4, "lr_text": 2e-4, "warmup_steps": 0}
    return RunConfig.model_validate({"model": MODEL, "optim": optim, "train": {"global_batch_size": PAIRS * arm.world}})


def settings_of(arm: Arm) -> dict[str, Any]:
    """As in ds_configs/, with buckets and parameters that are whole at a time to fit a small limit."""
    if arm.ds is None:
        return {"zero_optimization": {"stage": 0}}
    found = read_ds_config(ROOT / "ds_configs" / arm.ds)
    smaller = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    found["zero_optimization"] |= {"reduce_bucket_size": 4_000_000} | dict.fromkeys(smaller, 4_000_000)
    found["optimizer"]["params"]["torch_adam"] = True
    return found


def batch(rank: int) -> Batch:
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, VOCABULARY, (PAIRS, LENGTH), generator=g)
    masked = (torch.arange(LENGTH) < 3).expand(PAIRS, -1)
    return Batch(
        keys=[""] * PAIRS, captions=[""] * PAIRS, shards=[""] * PAIRS,
        images=torch.randint(0, 256, (PAIRS, 3, 64, 64), generator=g, dtype=torch.uint8),
        input_ids=ids, attention_mask=torch.ones_like(ids), pair_ids=(rank * PAIRS + torch.arange(PAIRS))[:, None],
        masked_ids=ids.masked_fill(masked, 4), mlm_labels=ids.masked_fill(~masked, IGNORED),
    )  # fmt: skip


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, resident; VmData, what RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def train(rank: int, arm: Arm) -> dict[str, Any]:
    """One rank: the curve of its resident memory above the libraries' (seconds, bytes), losses, and what failed."""
    from sacl_ds.model.sacl import SaclModel
    from sacl_ds.training.engine import build_engine, start_process
    from sacl_ds.training.objective import PretrainObjective, Targets

    start_process()
    torch.set_num_threads(1)
    run, data = run_of(arm), batch(rank)
    targets = Targets(None, 0.0, torch.Generator().manual_seed(rank))
    settings = resolve(settings_of(arm), run, arm.world, this_machine("cpu"))
    dist.barrier()
    resident, counted = status("VmRSS"), status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (counted + int(arm.limit * 2**30),) * 2)
    curve: list[tuple[float, int]] = []
    done, began = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(0.1):
            curve.append((round(time.perf_counter() - began, 2), status("VmRSS") - resident))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    losses: list[float] = []
    failed = None
    try:
        torch.manual_seed(0)
        model = PretrainObjective(SaclModel(run.model, VOCABULARY, pretrained=False), run.loss)
        engine = build_engine(model, settings, run.optim)
        for _ in range(arm.steps):
            loss = engine(data, targets)["loss"]
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / arm.world)
    except RuntimeError as error:
        refused = [line for line in str(error).splitlines() if "can't allocate memory" in line]
        if not refused and "Connection closed by peer" not in str(error):
            raise
        failed = refused[0].split(" == 0. ")[-1].split(". Error code")[0] if refused else "another rank ended"
    done.set()
    watcher.join()
    dist.destroy_process_group()
    return {"curve": curve, "losses": losses, "failed": failed}


def draw(results: list[dict[str, Any]], limit: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.2), sharey=True, squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        for rank, each in enumerate(result["ranks"]):
            seconds, held = zip(*each["curve"], strict=True)
            panel.plot(seconds, [size / 2**30 for size in held], label=f"rank {rank}", linewidth=1.2)
            if each["failed"]:
                panel.plot(seconds[-1], held[-1] / 2**30, "x", color="black", label="out of memory")
        panel.axhline(limit, color="black", linestyle="--", linewidth=0.8)
        panel.set_title(result["arm"]["name"], fontsize=10)
        panel.set_xlabel("seconds")
        panel.legend(fontsize=7, loc="lower right")
    panels[0][0].set_ylabel("GiB above the libraries")
    panels[0][0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1.0, help="GiB a rank may use (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="with ZeRO 3 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--docs", type=user_path, required=True, help="JSON file, beside which offload.png is written")
    options = parser.parse_args()
    many, common = options.ranks, (options.limit, options.steps)
    arms = [
        Arm("1 rank, no ZeRO", 1, None, *common),
        Arm(f"{many} ranks, ZeRO 3", many, "zero3.json", *common),
        Arm(f"{many} ranks, ZeRO 3, offload", many, "zero3_offload.json", *common),
    ]
    # every large tensor by a mapping of its own, which goes back to the kernel when it is freed
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    results, lines = [], []
    for arm in arms:
        ranks = on_ranks(arm.world, train, arm)
        if None in ranks:
            raise RuntimeError(f"{arm.name}: a rank ended without a result; see above")
        results.append({"arm": asdict(arm), "ranks": ranks})
        most = max(size for each in ranks for _, size in each["curve"]) / 2**30
        losses = ranks[0]["losses"]
        reasons = sorted({each["failed"] for each in ranks if each["failed"]})
        ended = "; ".join(reasons) or f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
        lines.append(f"{arm.name}: at most {most:.2f} of {arm.limit} GiB; {ended}")
        print(lines[-1], flush=True)
    parameters = PlannedJob(run_of(arms[0]), 1, Zero(), vocab_size=VOCABULARY).parameters
    record_limited(options.docs, {"parameters": parameters, "limit": options.limit, "arms": lines})
    draw(results, options.limit, options.docs.parent / "offload.png")


if __name__ == "__main__":
    sys.exit(exit_status(main))
