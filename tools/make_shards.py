"""Write webdataset shards (img2dataset's layout) from a Karpathy JSON or from the built-in scenes.

python tools/make_shards.py karpathy --json dataset.json --images images/ --split train --out shards/train
python tools/make_shards.py scenes --count 10000 --seed 1 --out shards/scenes

Stopped half-way, the same command goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sacl_ds.data.record_lists import karpathy_records, scene_records
from sacl_ds.data.shard_writer import Record, write_shards
from sacl_ds.errors import UserError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    karpathy = sources.add_parser("karpathy", help="Karpathy JSON (COCO, Flickr30k, Flickr8k) and a folder of images")
    karpathy.add_argument("--json", type=Path, required=True)
    karpathy.add_argument("--images", type=Path, required=True)
    karpathy.add_argument("--split", default="train", help="default: %(default)s, with restval")
    scenes = sources.add_parser("scenes", help="the built-in scenes")
    scenes.add_argument("--count", type=int, required=True)
    scenes.add_argument("--seed", type=int, default=1)
    scenes.add_argument("--image-size", type=int, default=48)
    scenes.add_argument("--detail", choices=["partial", "simple"], default="partial")
    for source in (karpathy, scenes):
        source.add_argument("--out", type=Path, required=True, help="folder of the shards")
        source.add_argument("--per-shard", type=int, default=1000, help="samples a shard (default: %(default)s)")
    return parser.parse_args()


def records(options: argparse.Namespace) -> list[Record]:
    if options.source == "karpathy":
        return karpathy_records(options.json, options.images, options.split)
    return scene_records(options.count, options.seed, options.image_size, options.detail)


def main() -> int:
    options = arguments()
    try:
        chosen = records(options)
        columns = (
            TextColumn("writing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples  ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            task = progress.add_task("", total=len(chosen))
            written, kept = write_shards(chosen, options.out, options.per_shard, lambda n: progress.advance(task, n))
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(chosen)} samples in {written + kept} shards under {options.out} ({kept} were there already)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
