"""Time, FLOP/s and memory of our training step, and of open_clip's at the same towers and batch.

Ours goes through the DeepSpeed engine: forward, backward, clipping, AdamW. open_clip's is its own way of training, over
our towers and over its own of the same size (pip install open_clip_torch; left out where missing). Data lie on the
device (with --micro-batch, ours on the host). Rounds alternate between all steps and medians count; memory is that of
a process of its own. All steps are held at once: on a GPU name few with --steps where they do not fit.

examples: python tools/benchmark_step.py --batch 64 --out benchmark
          deepspeed --num_gpus 8 tools/benchmark_step.py --preset base --precision bf16 --batch 2048 --out benchmark
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config import PRESETS
from sacl_ds.config.room import user_path
from sacl_ds.errors import UserError

if TYPE_CHECKING:
    from step_benchmark.setting import BenchmarkSetting

    from sacl_ds.machine import Machine

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "deepspeed", "transformers", "timm", "open_clip_torch")


def arguments(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS), help="default: %(default)s")
    for name in ("width", "depth", "heads", "patch", "image-size", "text-layers", "fusion-layers", "embed-dim"):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help="in place of the preset's; width and heads: of both"
        )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of the longest caption, in place of the preset's")
    parser.add_argument("--batch", type=int, default=64, help="pairs, over all ranks (default: %(default)s)")
    parser.add_argument(
        "--captions", default="real", choices=["real", "full"], help="lengths: as Flickr8k's, or longest"
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument(
        "--ds_config", default=str(ROOT / "ds_configs/zero1.json"), help="of our steps (default: ZeRO 1)"
    )
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, e.g. 'ITC, SACL'; ?: print the names")
    parser.add_argument(
        "--micro-batch", type=int, metavar="N", help="pairs of a rank at once, in our steps; default: all"
    )
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in our steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks in our steps")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="steps in a row in a round (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure it")
    parser.add_argument("--out", type=user_path, help="folder for results.json, table.md and plot.png")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    least = {"--batch": (options.batch, 2), "--rounds": (options.rounds, 1), "--repeats": (options.repeats, 1)}
    least["--micro-batch"] = options.micro_batch, 1
    for name, (given, needed) in least.items():
        if given is not None and given < needed:
            raise UserError(f"{name} {given}: at least {needed}")
    return options


def chosen(asked: list[str] | None) -> list[str]:
    from step_benchmark.ours import CASES
    from step_benchmark.peers import peers

    known = [*peers(), *CASES]
    for name in asked or []:
        if name not in known:
            raise UserError(f"--steps {name!r}: there is {'; '.join(known)}")
    return [name for name in known if asked is None or name in asked]


def check(names: list[str], setting: BenchmarkSetting, machine: Machine) -> None:
    """UserError for what no step could be built with."""
    from step_benchmark.ours import CASES, run_of

    from sacl_ds.distributed import world_size
    from sacl_ds.ds_config import resolve

    mine, left = divmod(setting.batch, world_size())
    if left:
        raise UserError(f"--batch {setting.batch} does not divide over {world_size()} ranks")
    if setting.micro_batch and mine % setting.micro_batch:
        raise UserError(f"--micro-batch {setting.micro_batch} does not divide the {mine} pairs of a rank")
    for name in names:
        if name in CASES:
            resolve(setting.ds, run_of(CASES[name], setting), world_size(), machine, name=setting.ds_name)


def build(name: str, setting: BenchmarkSetting, machine: Machine) -> Any:
    """The step of that name, with a batch of its own."""
    from step_benchmark.ours import CASES, OurStep
    from step_benchmark.peers import OpenClipStep
    from step_benchmark.setting import random_batch

    from sacl_ds.distributed import rank, world_size

    batch = random_batch(setting, setting.batch // world_size(), rank())
    return OurStep(CASES[name], setting, batch, machine) if name in CASES else OpenClipStep(name, setting, batch)


def memory_of(name: str, words: list[str]) -> float | None:
    """Bytes at the peak of that step, the most of any rank, in processes of their own: one beside each of ours."""
    from sacl_ds.distributed import broadcast_object, gather_objects, rank

    port = None
    if rank() == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    env = os.environ | {"MASTER_PORT": str(broadcast_object(port))}
    line = [sys.executable, __file__, *words, "--memory-of", name]
    done = subprocess.run(line, env=env, stdout=subprocess.PIPE, text=True)
    found = gather_objects(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None)
    return None if None in found else max(found)


def measure(names: list[str], setting: BenchmarkSetting, machine: Machine, options: argparse.Namespace) -> Any:
    """{name: Measured}, without memory."""
    from step_benchmark.measure import seconds_of
    from step_benchmark.ours import OurStep
    from step_benchmark.report import Measured

    from sacl_ds.distributed import sum_over_ranks, world_size
    from sacl_ds.telemetry.throughput import Throughput

    steps = {name: build(name, setting, machine) for name in names}
    alone = {f"loss of {name}": step.loss_alone() for name, step in steps.items() if isinstance(step, OurStep)}
    taken = seconds_of(steps | alone, options.rounds, options.warm_up, options.repeats, setting.device)
    measured = {}
    for name, step in steps.items():
        counter = Throughput("pairs", setting.device, world_size(), step.flops)
        counter.add(step.batch.attention_mask)
        figures = counter.settle(1, 1, 1.0, setting.batch, sum_over_ranks(counter.lengths()))
        measured[name] = Measured(taken[name], figures.get("flops_per_second"), taken.get(f"loss of {name}"), None)
    return measured


def heading(setting: BenchmarkSetting, options: argparse.Namespace) -> str:
    import torch

    from sacl_ds.distributed import world_size

    on_gpu = setting.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if _installed(name)]
    batch = (
        f"batch {setting.batch} on {world_size()} rank{'s' if world_size() > 1 else ''}, {options.captions} captions"
    )
    ours = [f"micro-batches of {setting.micro_batch}"] if setting.micro_batch else []
    ours += ["activations recomputed"] * setting.checkpoint + ["blocks compiled"] * setting.compiled
    told = f" (our steps: {', '.join(ours)})" if ours else ""
    return f"{device}, {setting.precision}, {batch}{told}, median of {options.rounds} rounds\n{', '.join(versions)}"


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def main() -> None:
    words = sys.argv[1:]
    options = arguments(words)
    if options.device:
        os.environ["DS_ACCELERATOR"] = options.device
    if options.steps == ["?"]:
        print("\n".join(chosen(None)))
        return
    from dataclasses import replace

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; leave it out, or take cpu")
    from step_benchmark.measure import peak_bytes
    from step_benchmark.peers import load, peers
    from step_benchmark.report import as_json, plot, rows_of, table
    from step_benchmark.setting import BenchmarkSetting, model_config

    from sacl_ds.distributed import rank
    from sacl_ds.ds_config import read_ds_config
    from sacl_ds.telemetry.throughput import device_peak
    from sacl_ds.training.engine import start_process

    names, model, ds = chosen(options.steps), model_config(options), read_ds_config(options.ds_config)
    device, machine = start_process()
    setting = BenchmarkSetting(
        model,
        options.batch,
        options.precision,
        options.captions,
        ds,
        options.ds_config,
        device,
        options.micro_batch,
        options.checkpoint,
        options.compile,
    )
    check(names, setting, machine)
    if options.memory_of:
        load(options.memory_of)
        found = peak_bytes(lambda: build(options.memory_of, setting, machine), device)
        print(json.dumps(found))
        return
    held = {name: None if options.no_memory else memory_of(name, words) for name in names}
    try:
        measured = measure(names, setting, machine, options)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(
            f"out of GPU memory with {len(names)} steps held at once ({reason}); name fewer with --steps, or take a "
            "smaller --batch"
        ) from None
    rows = rows_of(
        {name: replace(found, bytes=held[name]) for name, found in measured.items()},
        setting.batch,
        device_peak(device, setting.precision),
    )
    if rank():
        return
    said = heading(setting, options)
    if not peers():
        said += "\nopen_clip is not installed: pip install open_clip_torch for the comparison"
    print(f"{said}\n\n{table(rows)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        results = {"heading": said, "settings": vars(options), "model": model.model_dump(), "rows": as_json(rows)}
        (options.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
        (options.out / "table.md").write_text(f"{said}\n\n{table(rows)}\n")
        plot(rows, said, options.out / "plot.png")


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
