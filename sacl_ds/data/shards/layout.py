"""File names in and beside a shard, as img2dataset has them. Imports nothing heavy: the writer needs no torch."""

from __future__ import annotations

from pathlib import Path

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def stats_path(shard: str | Path) -> Path:
    """Return the path of a shard's stats file: 00012.tar -> 00012_stats.json."""
    shard = Path(shard)
    return shard.with_name(f"{shard.stem}_stats.json")
