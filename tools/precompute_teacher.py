"""Run a frozen teacher over shards once and keep its features, in half precision.

Training reads them with teacher.features=beside (or a folder) instead of
running the teacher. Stopped half-way, the same command goes on; several
processes or machines share the work by --part.
"""

import argparse
import os
import re
import sys

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sacl_ds.config.room import expanded
from sacl_ds.data.shards.index import index_shards
from sacl_ds.data.shards.source import ShardSource
from sacl_ds.data.teacher_features import BESIDE, FeatureFolder
from sacl_ds.errors import UserError
from sacl_ds.model.teacher import load_teacher
from sacl_ds.model.teacher_pass import shard_features
from sacl_ds.telemetry.progress import counting

EXAMPLE = """example:
  python tools/precompute_teacher.py --teacher openai/clip-vit-base-patch16 \\
      --shards '/data/cc12m/{00000..01242}.tar'"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", required=True, type=expanded, help="as teacher.checkpoint: run directory, CLIPModel or hub name"
    )
    parser.add_argument("--shards", required=True, nargs="+", metavar="PATTERN", help="as data.shards")
    parser.add_argument("--allow-missing", type=int, default=0, metavar="N", help="as data.allow_missing")
    parser.add_argument(
        "--out", default=BESIDE, type=expanded, help="folder, or 'beside' each shard (default: %(default)s)"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch-size", type=int, default=256, help="images at a time (default: %(default)s)")
    speed.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    cores = min(16, os.cpu_count() or 1)
    speed.add_argument("--threads", type=int, default=cores, help="that decode (default: %(default)s)")
    speed.add_argument("--part", default="1/1", metavar="I/N", help="every N-th shard, from the I-th on")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", options.part)
    if not part or int(part[1]) > int(part[2]):
        raise UserError(f"--part {options.part}: I/N with I from 1 to N, e.g. 2/8")
    with counting("counting the samples of shards") as done:
        index = index_shards(options.shards, "--shards", typed=True, allow_missing=options.allow_missing, done=done)
    if index.missing:
        print(f"warning: {index.left_out}")
    device = torch.device(options.device)
    teacher = load_teacher(options.teacher, device, "--teacher")
    folder = FeatureFolder(options.out, teacher.identity)
    folder.require(index.shards)
    mine = range(int(part[1]) - 1, len(index.shards), int(part[2]))
    left = [number for number in mine if not folder.path(index.shards[number]).exists()]
    source = ShardSource(index)
    console = Console(markup=False, emoji=False)
    columns = TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=sum(index.counts[number] for number in left))
        for number in left:
            found = shard_features(
                teacher, source, number, device, options.batch_size, options.threads, lambda n: bar.advance(task, n)
            )
            found.save(folder.path(index.shards[number]), teacher.identity)
            unusable = found.samples.count(0)
            if unusable:
                console.print(f"{index.shards[number]}: {unusable} samples cannot be used", highlight=False)
    there = len(mine) - len(left)
    console.print(
        f"{len(left)} shards done, {there} were there; train with teacher.checkpoint={options.teacher} "
        f"teacher.features={options.out}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
