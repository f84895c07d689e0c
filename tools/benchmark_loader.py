"""Images per second from tar to batch: this loader beside that of open_clip.

Both read the same shards with the same worker processes, crop at random (0.9 to
1 of the area), resize to the same size by bicubic interpolation and tokenise
captions. open_clip's batches are floats, normalised; ours are bytes, normalised
on the device, and hold masked tokens and duplicate ids as well.
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from sacl_ds.errors import UserError

CAPTION = "a photograph of some thing number {} beside another on a table"
EXAMPLE = """example:
  python tools/benchmark_loader.py --shards '/data/cc12m/{00000..00007}.tar' --workers 8 --batch-size 256"""


def ours(shards: str, options: SimpleNamespace) -> Iterator[Any]:
    from sacl_ds.config import DataConfig
    from sacl_ds.data.batch import TrainingView
    from sacl_ds.data.collate import Collator
    from sacl_ds.data.loader import BatchLoader
    from sacl_ds.data.order import GlobalOrder
    from sacl_ds.data.shards.index import index_shards
    from sacl_ds.data.shards.source import ShardSource
    from sacl_ds.data.text import Tokenizer, train_wordpiece
    from sacl_ds.data.transforms import TrainView

    source = ShardSource(index_shards(shards, typed=True), DataConfig())
    order = GlobalOrder(source.sets, options.batch_size, 0)
    tokenizer = Tokenizer(train_wordpiece(source.captions(1000), 4000), 32)
    view = TrainingView(TrainView(options.image_size, (0.9, 1.0), flip=False), tokenizer)
    collator = Collator(view, 0, mlm_probability=0.15)
    loader = BatchLoader(source, order, collator, rank=0, world=1, workers=options.workers)
    return (batch.images for batch in loader)


def open_clip(shards: str, options: SimpleNamespace) -> Iterator[Any]:
    import open_clip_train.data
    from open_clip import get_tokenizer, image_transform
    from webdataset.tariterators import tar_file_expander

    # it is made for webdataset up to 0.2.86; what has come since marks the end of each shard, which it does not know
    open_clip_train.data.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)

    settings = SimpleNamespace(
        train_data=shards, dataset_resampled=True, train_num_samples=10_000_000, train_data_upsampling_factors=None,
        seed=0, batch_size=options.batch_size, workers=options.workers, world_size=1,
    )  # fmt: skip
    transform = image_transform(options.image_size, is_train=True)
    data = open_clip_train.data.get_wds_dataset(settings, transform, is_train=True, tokenizer=get_tokenizer("ViT-B-32"))
    # up to open_clip 3 a batch is (images, texts), from 4 on a mapping
    return (batch["image"] if isinstance(batch, Mapping) else batch[0] for batch in data.dataloader)


LOADERS: dict[str, Callable[[str, SimpleNamespace], Iterator[Any]]] = {"open_clip": open_clip, "sacl_ds": ours}


def count_of(images: Any, options: SimpleNamespace) -> int:
    """How many images a batch holds. Raises UserError for what is not the (batch size, 3, image size, image size) that
    was asked for: a loader that is counted wrongly is compared wrongly."""
    size = options.image_size
    expected = (options.batch_size, 3, size, size)
    if not isinstance(images, torch.Tensor) or tuple(images.shape) != expected:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise UserError(f"a batch has {got} in the place of images {expected}; nothing is measured")
    return len(images)


def measure(name: str, shards: str, options: SimpleNamespace) -> float:
    """Images per second, after the first ones have come and queues have filled and emptied. Raises UserError where the
    loader gives other batches than it was asked for."""
    torch.set_num_threads(1)
    batches = LOADERS[name](shards, options)
    warm = 0
    while warm < options.warm_up:
        warm += count_of(next(batches), options)
    count, began = 0, time.perf_counter()
    while count < options.images:
        count += count_of(next(batches), options)
    return count / (time.perf_counter() - began)


def in_fresh_process(name: str, shards: str, options: argparse.Namespace) -> float:
    asked = json.dumps({"name": name, "shards": shards, "options": vars(options)})
    done = subprocess.run([sys.executable, __file__, "--ask", asked], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return float(json.loads(done.stdout.splitlines()[-1]))


def write_photographs(folder: Path, shards: int, per_shard: int) -> str:
    """Shards of 500 x 375 JPEGs of about 50 kB: shapes, edges and grain."""
    from sacl_ds.data.making.writer import Record, write_shards

    draw = np.random.default_rng(0)
    y, x = np.mgrid[:375, :500] / 375

    def photograph(number: int) -> bytes:
        a, b, c = draw.uniform(2, 30, 3)
        waves = [np.sin(a * x + b * y * y + k) + 0.7 * np.sign(np.sin(c * y - b * x + 2 * k)) for k in range(3)]
        pixels = 128 + 50 * np.stack(waves, -1) + draw.normal(0, 9, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=85)
        return buffer.getvalue()

    made = [photograph(number) for number in range(min(200, shards * per_shard))]
    records = [
        Record(f"{n:06d}", [CAPTION.format(n)], lambda n=n: made[n % len(made)], {}) for n in range(shards * per_shard)
    ]
    write_shards(records, folder, per_shard)
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def report(speeds: dict[str, list[float]], options: argparse.Namespace, what: str) -> str:
    lines = [
        f"{what}, to {options.image_size} px, {options.workers} workers, {len(os.sched_getaffinity(0))} cores, "
        f"median of {options.rounds}",
        "",
        "| loader | images/s | of open_clip |",
        "|---|---|---|",
    ]
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, speed in medians.items():
        ratio = f"{speed / medians['open_clip']:.2f}" if "open_clip" in medians else ""
        lines.append(f"| {name} | {speed:.0f} | {ratio} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", metavar="PATTERN", help="default: 500 x 375 JPEGs made for this")
    parser.add_argument("--image-size", type=int, default=256, help="pixels a side (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=4000, help="timed in each round (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2000, help="images before that (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), help="of the loaders")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.ask:
        asked: dict[str, Any] = json.loads(options.ask)
        try:
            print(json.dumps(measure(asked["name"], asked["shards"], SimpleNamespace(**asked["options"]))))
        except UserError as error:
            sys.exit(f"error: {asked['name']}: {error}")
        return
    names = [name for name in LOADERS if options.only is None or name in options.only]
    if "open_clip" in names and not all(map(importlib.util.find_spec, ("open_clip_train", "pandas"))):
        print("open_clip is left out: pip install 'sacl_ds[benchmark]', or open_clip_torch and pandas", file=sys.stderr)
        names.remove("open_clip")
    with tempfile.TemporaryDirectory() as folder:
        shards = options.shards or write_photographs(Path(folder), 4, 1000)
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(options.rounds):
            for name in names:
                speeds[name].append(in_fresh_process(name, shards, options))
            print(f"round {turn + 1} of {options.rounds}: done", file=sys.stderr, flush=True)
    what = options.shards or "500 x 375 JPEGs"
    print(report(speeds, options, what))


if __name__ == "__main__":
    main()
