"""Seconds and memory of retrieval's first stage: places of the right candidates and the best of all, both directions.

Features are random unit vectors, captions near their images, so that figures are between chance and perfect. Peak
memory is that of the whole process; beside it stands what it held, features included, when ranking began.

example: python tools/benchmark_retrieval.py --images 5000 --captions 25000 --dim 256
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config.room import user_path
from sacl_ds.errors import UserError
from sacl_ds.evaluation.first_stage import rank_candidates
from sacl_ds.evaluation.metrics import recall_of_places
from sacl_ds.evaluation.ranking import KS, OWN, Truth
from sacl_ds.telemetry.progress import counting_stages


def features(images: int, captions: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit features of images and of captions, float32, and each caption's image."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((images, dim), np.float32)
    owner = np.arange(captions) * images // captions
    text = image[owner] + 3 * rng.standard_normal((captions, dim), np.float32)
    return *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)), owner


def measure(options: argparse.Namespace) -> dict[str, object]:
    image, text, owner = features(options.images, options.captions, options.dim)
    truth = Truth(owner, options.images, None)
    before = psutil.Process().memory_info().rss
    seconds, recalls = {}, {}
    with counting_stages() as done:
        for name, queries, candidates, relevance, k in (
            ("text_to_image", text, image, truth.of_texts(), min(options.k_images, options.images)),
            ("image_to_text", image, text, truth.of_images(), min(options.k_captions, options.captions)),
        ):
            started = time.perf_counter()
            ranked = rank_candidates(queries, candidates, relevance, k, done, name.replace("_to_", "→"))
            seconds[name] = time.perf_counter() - started
            recalls[name] = recall_of_places(ranked.places[OWN], KS)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "images": options.images, "captions": options.captions, "dim": options.dim, "seconds": seconds,
        "k": {"text_to_image": options.k_images, "image_to_text": options.k_captions},
        "bytes_before": before, "bytes_peak": peak, "recall": recalls, "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def show(found: dict[str, object]) -> None:
    table = Table(title=f"{found['images']} images, {found['captions']} captions, {found['dim']} dimensions")
    for heading in ("direction", "kept", "seconds", *(f"R@{k} %" for k in KS)):
        table.add_column(heading, justify="left" if heading == "direction" else "right")
    seconds, recalls, kept = found["seconds"], found["recall"], found["k"]
    assert isinstance(seconds, dict)
    assert isinstance(recalls, dict)
    assert isinstance(kept, dict)
    for name, spent in seconds.items():
        values = [f"{100 * recalls[name][k]:.1f}" for k in KS]
        table.add_row(name.replace("_to_", "→"), str(kept[name]), f"{spent:.1f}", *values)
    before, peak = (int(found[name]) / 2**20 for name in ("bytes_before", "bytes_peak"))  # type: ignore[call-overload]
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{sum(seconds.values()):.1f} s, {found['threads']} threads on {found['cpus']} cores")
    console.print(f"process at its peak {peak:.0f} MiB, before {before:.0f} MiB: {peak - before:.0f} MiB")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k-images", type=int, default=256, help="images kept for each caption")
    parser.add_argument("--k-captions", type=int, default=128, help="captions kept for each image")
    parser.add_argument("--out", type=user_path, help="write the figures as JSON")
    options = parser.parse_args()
    for name in ("images", "captions", "dim", "k_images", "k_captions"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    found = measure(options)
    show(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
