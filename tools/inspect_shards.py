"""Look into webdataset shards: counts, sizes, captions, duplicates, and samples
that training would stop at.

The exit status is 1 where samples are broken, shards cannot be read, or stats
disagree with their tar.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sacl_ds.config.room import user_path
from sacl_ds.data.images import open_image
from sacl_ds.data.inspection import LISTED, Example, Inspection, Repeats, expected_samples, inspect_shards, quantiles
from sacl_ds.data.making.record import size
from sacl_ds.data.shards.patterns import expand
from sacl_ds.errors import UserError
from sacl_ds.telemetry.sheet import LARGE, Tile, draw_rows

EXAMPLE = """example:
  python tools/inspect_shards.py 'shards/{00000..00005}.tar' --sheet sheet.png"""
COLUMNS, ROWS = 5, 4  # of the sheet
BARS = 12  # rows of the histogram
BAR_WIDTH = 40


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, epilog=EXAMPLE)
    what = parser.add_argument_group("what to look at")
    what.add_argument("pattern", nargs="+", help="shards, as in data.shards; quoted, or the shell expands it")
    what.add_argument(
        "--limit", type=int, metavar="N", help="samples, spread evenly over the shards (default: all of them)"
    )
    more = parser.add_argument_group("more than the table")
    more.add_argument(
        "--sheet",
        type=user_path,
        metavar="PNG",
        help=f"write {COLUMNS * ROWS} images with captions, drawn evenly over the shards (default: none)",
    )
    more.add_argument("--json", type=user_path, metavar="JSON", help="write all figures (default: none)")
    return parser.parse_args()


def report(found: Inspection, console: Console) -> None:
    folders = {shard.rpartition("/")[0] for shard in found.shards}
    folder = folders.pop() if len(folders) == 1 else ""  # said once where it is the same for all
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(found, folder):
        facts.add_row(name, Text(value))
    console.print(facts)
    if found.words:
        console.print()
        console.print(_spreads(found))
        console.print("\n[bold]words in a caption")
        for line in _histogram(found.words):
            console.print(Text(line))
    for title, lines in _lists(found, folder):
        console.print(f"\n[bold]{title}")
        for line in lines:
            console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False))


def _facts(found: Inspection, folder: str) -> list[tuple[str, str]]:
    formats = ", ".join(f"{count} {name}" for name, count in found.formats.most_common())
    captions = sum(found.words.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.broken.most_common())
    stats = [
        f"{len(found.missing_stats)} of {len(found.shards)} shards have none: each run scans them at its start"
        if found.missing_stats
        else "",
        f"{len(found.wrong_stats)} disagree with the tar" if found.wrong_stats else "",
    ]
    return [
        ("shards", f"{len(found.shards)}" + (f" in {folder}" if folder else "")),
        ("samples", f"{found.samples}" + ("" if found.complete else ", the others not looked at (--limit)")),
        ("images", f"{size(sum(found.image_bytes))}: {formats or 'none that decodes'}"),
        ("captions", f"{captions}, {captions / max(1, found.samples):.2f} a sample"),
        ("same image", _repeats(found.repeated_images)),
        ("same caption", _repeats(found.repeated_captions)),
        ("stats", "; ".join(filter(None, stats)) or "beside every shard"),
        ("broken", reasons or "none"),
        *([("cut short", f"{len(found.unreadable_shards)} shards")] if found.unreadable_shards else []),
    ]


def _spreads(found: Inspection) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(("", "min", "5 %", "median", "95 %", "max")):
        table.add_column(name, justify="right" if number else "left", style="" if number else "bold")
    measured = [
        ("image file", {name: size(value) for name, value in found.image_sizes().items()}),
        ("image width", quantiles(found.widths)),
        ("image height", quantiles(found.heights)),
        ("words a caption", quantiles(found.words)),
        ("captions a sample", quantiles(found.captions)),
    ]
    for name, values in measured:
        table.add_row(name, *(str(value) for value in values.values()))
    return table


def _repeats(repeats: Repeats) -> str:
    if not repeats.repeated:
        return "none occurs twice"
    return f"{repeats.repeated} of {repeats.total} repeat an earlier one ({100 * repeats.share:.2g} %)"


def _histogram(counts: Counter[int]) -> list[str]:
    """Lengths in at most BARS classes of equal width, the last one open; '10–11 ███████ 412'."""
    top = quantiles(counts)["max"] if len(counts) <= BARS else _percentile(counts, 0.99)
    width = max(1, -(-(top + 1) // BARS))
    classes = Counter({0: 0})
    for value, count in counts.items():
        classes[min(value // width, top // width)] += count
    lines = []
    for number in range(min(classes), max(classes) + 1):
        first, last = number * width, (number + 1) * width - 1
        label = f"{first}–{last}" if width > 1 else f"{first}"
        label = f"{first}+" if number == top // width and max(counts) > last else label
        bar = "█" * round(BAR_WIDTH * classes[number] / max(classes.values()))
        lines.append(f"  {label:>7}  {bar} {classes[number]}")
    return lines[1:] if not classes[0] and len(lines) > 1 else lines


def _percentile(counts: Counter[int], share: float) -> int:
    wanted, reached = share * sum(counts.values()), 0
    for value in sorted(counts):
        reached += counts[value]
        if reached >= wanted:
            return value
    return max(counts)


def _lists(found: Inspection, folder: str) -> list[tuple[str, list[str]]]:
    """(title, lines) of what is wrong or repeated."""

    def place(sample: dict[str, Any]) -> str:
        shard = sample["shard"].removeprefix(f"{folder}/") if folder else sample["shard"]
        return f"{shard} {sample['key']}"

    lists = []
    for title, repeats in (("same image", found.repeated_images), ("same caption", found.repeated_captions)):
        lines = []
        for example in repeats.examples:
            places = " and ".join(map(place, example["samples"]))
            said = [example["caption"], f"    {places}"] if "caption" in example else [places]
            lines += [f"{example['times']} times: {said[0]}", *said[1:]]
        lists.append((f"{title}, most frequent", lines))
    first = f", the first {LISTED}" if sum(found.broken.values()) > LISTED else ""
    lists.append((f"broken samples{first}", [f"{place(entry)}: {entry['reason']}" for entry in found.broken_listed]))
    wrong = [f"{e['shard']}: stats say {e['stats']}, the tar holds {e['tar']}" for e in found.wrong_stats[:LISTED]]
    lists.append(("stats that disagree with the tar; remove them or make the shard again", wrong))
    lists.append(("shards that cannot be read to their end", [e["reason"] for e in found.unreadable_shards[:LISTED]]))
    return [(title, lines) for title, lines in lists if lines]


def sheet_rows(examples: Sequence[Example]) -> list[tuple[str, list[Tile]]]:
    """Rows of a sheet: each picture with its captions, shard and key."""
    tiles = []
    for example in examples[: COLUMNS * ROWS]:
        encoded = open_image(example.image)
        encoded.draft("RGB", (LARGE.width, LARGE.picture))
        where = f"{Path(example.shard).name}  {example.key}"
        tiles.append(Tile(encoded.convert("RGB"), example.captions, (where,)))
    return [("", tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]


def main() -> int:
    options = arguments()
    columns = (
        TextColumn("reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples  ETA"),
        TimeRemainingColumn(),
    )
    try:
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit {options.limit}: at least one sample")
        files = [file for pattern in options.pattern for file in expand(pattern, "the pattern of shards", typed=True)]
        shown = Console(stderr=True)
        with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
            expected = expected_samples(files)
            total = min(options.limit, expected or options.limit) if options.limit else expected
            task = progress.add_task("", total=total)
            wanted = COLUMNS * ROWS if options.sheet else 0
            found = inspect_shards(files, options.limit, wanted, lambda n: progress.advance(task, n))
        if options.json:
            options.json.write_text(json.dumps(found.summary(), indent=2) + "\n")
        if options.sheet:
            draw_rows(sheet_rows(found.sheet), options.sheet, LARGE)
        report(found, Console(width=None if sys.stdout.isatty() else 80, highlight=False))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0 if found.sound else 1


if __name__ == "__main__":
    sys.exit(main())
