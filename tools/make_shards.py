"""Write webdataset shards (img2dataset's layout) from captioned images.

All samples are looked at before the first shard is written, though images are
decoded only then; one that is broken ends the command with a line that names
it, unless --skip-broken. Stopped half-way, the same command goes on.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sacl_ds.config.room import user_path
from sacl_ds.data.making.lists import (
    coco_records,
    folder_records,
    karpathy_records,
    scene_records,
    table_records,
)
from sacl_ds.data.making.record import Record, Survey, describe, require_space, sampled_survey, survey
from sacl_ds.data.making.writer import SKIPPED, list_skipped, write_shards
from sacl_ds.errors import UserError

EXAMPLES = {
    "karpathy": "--json dataset_flickr8k.json --images images/ --split val",
    "coco": "--json captions_train2017.json --images train2017/",
    "table": "--table pairs.csv --image-column path --images images/",
    "folder": "--images photographs/",
    "scenes": "--count 10000 --seed 1",
}
SUMMARIES = {
    "karpathy": "Karpathy JSON (COCO, Flickr30k, Flickr8k) and a folder of images",
    "coco": "COCO captions JSON and a folder of images",
    "table": "CSV, TSV or parquet of image paths and captions",
    "folder": "images, each with a .txt of the same name, one caption a line",
    "scenes": "the built-in scenes",
}


def example_of(source: str) -> str:
    return f"example:\n  python tools/make_shards.py {source} \\\n      {EXAMPLES[source]} --out shards/"


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    example = f"{example_of('table')}\n\nevery SOURCE has its own --help"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, epilog=example)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE", title="sources")
    for name, summary in SUMMARIES.items():
        source = sources.add_parser(
            name, help=summary, description=summary, epilog=example_of(name), formatter_class=raw
        )
        read = source.add_argument_group("source")
        if name == "scenes":
            read.add_argument("--count", type=int, required=True, help="how many")
            read.add_argument("--seed", type=int, default=1, help="default: %(default)s")
            read.add_argument("--image-size", type=int, default=48, help="pixels a side (default: %(default)s)")
            read.add_argument(
                "--detail",
                choices=["partial", "simple", "detailed"],
                default="partial",
                help="captions: some of one or two objects, one's colour and shape, or much (default: %(default)s)",
            )
        elif name in ("karpathy", "coco"):
            read.add_argument("--json", type=user_path, required=True, help="file of captions")
        elif name == "table":
            read.add_argument("--table", type=user_path, required=True, help=".csv, .tsv, .csv.gz, .tsv.gz or .parquet")
            read.add_argument(
                "--image-column",
                default="path",
                metavar="NAME",
                help="paths; in parquet also encoded images (default: %(default)s)",
            )
            read.add_argument("--caption-column", default="caption", metavar="NAME", help="default: %(default)s")
            read.add_argument(
                "--delimiter",
                metavar="CHARACTER",
                help="between the values of a CSV or TSV, such as ';', '|' or '\\t' (default: as its name ends)",
            )
            read.add_argument(
                "--no-quotes",
                action="store_true",
                help="quotation marks in CSV and TSV are plain characters (default: they enclose values)",
            )
        if name == "karpathy":
            read.add_argument("--split", default="train", help="default: %(default)s, with restval")
        if name != "scenes":
            what = "folder, subfolders included" if name == "folder" else "folder that the paths start from"
            required = name != "table"
            default = "" if required else " (default: where you are)"
            read.add_argument("--images", type=user_path, required=required, default=Path(), help=what + default)
        shards = source.add_argument_group("shards")
        shards.add_argument("--out", type=user_path, required=True, help="folder of the shards")
        shards.add_argument("--per-shard", type=int, default=1000, help="samples a shard (default: %(default)s)")
        if name != "scenes":
            shards.add_argument(
                "--skip-broken",
                action="store_true",
                help=f"leave out what cannot be used, list it in {SKIPPED} beside the shards (default: stop there)",
            )
    return parser.parse_args()


def records(options: argparse.Namespace) -> Iterable[Record]:
    if options.source == "karpathy":
        return karpathy_records(options.json, options.images, options.split)
    if options.source == "coco":
        return coco_records(options.json, options.images)
    if options.source == "table":
        columns = options.image_column, options.caption_column
        return table_records(
            options.table, options.images, *columns, quotes=not options.no_quotes, delimiter=options.delimiter
        )
    return folder_records(options.images)


def write(options: argparse.Namespace, progress: Progress) -> tuple[Survey, int, int]:
    """(what the list holds, shards written now, shards that were there)."""
    skip = options.source != "scenes" and options.skip_broken
    if options.source == "scenes":
        chosen: Iterable[Record] = (
            scenes := scene_records(options.count, options.seed, options.image_size, options.detail)
        )
        found = sampled_survey(scenes)
    else:
        checking = progress.add_task("checking", total=None)
        chosen = records(options)
        found = survey(chosen, skip, lambda n: progress.advance(checking, n))
        progress.update(checking, total=found.samples)
    found.require(skip)
    require_space(options.out, found.tar_bytes)
    writing = progress.add_task("writing", total=found.samples)
    written, kept = write_shards(
        chosen,
        options.out,
        options.per_shard,
        lambda n: progress.advance(writing, n),
        total=found.samples,
        skip_broken=skip,
    )
    return found, written, kept


def main() -> int:
    options = arguments()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples  ETA"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            found, written, kept = write(options, progress)
        skipped = list_skipped(options.out)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    captions = skipped.pop("empty caption", 0)
    count = found.samples - sum(skipped.values())
    print(f"{count} samples in {written + kept} shards under {options.out} ({kept} were there already)")
    if skipped:
        print(f"left out {sum(skipped.values())} samples: {describe(skipped)}; see {options.out / SKIPPED}")
    if captions:
        print(f"left out {captions} empty captions of samples that have others; see {options.out / SKIPPED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
