"""Survey of a list of records before they are written: broken ones, as far as is cheap, and the space needed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sacl_ds.data.making.record import BrokenSample, Record
from sacl_ds.errors import UserError

_TAR_BLOCK = 512
_LOOKED_AT = 16


@dataclass
class Survey:
    samples: int = 0  # records of the list, broken ones too
    tar_bytes: int = 0
    broken: Counter[str] = field(default_factory=Counter)  # by reason
    first: str = ""

    def require(self, skip_broken: bool) -> None:
        """Raises UserError, one line, for an empty list, for broken samples that may not be skipped, or if all are."""
        if not self.samples:
            raise UserError("there are no samples to write; see that the options name the right files")
        broken = sum(self.broken.values())
        if broken == self.samples or (broken and not skip_broken):
            advice = "or leave such samples out with --skip-broken" if broken < self.samples else "and the options"
            raise UserError(
                f"{broken} of {self.samples} samples cannot be written ({describe(self.broken)}), first {self.first}; "
                f"correct them {advice}"
            )


def survey(records: Iterable[Record], skip_broken: bool, seen: Callable[[int], None] = lambda count: None) -> Survey:
    """Check the captions of every record, and whether its image file is there: no image is read."""
    found = Survey()
    for record in records:
        found.samples += 1
        try:
            captions = record.checked_captions(drop_empty=skip_broken)
            found.tar_bytes += _tar_bytes(record.image_size(), captions)
        except BrokenSample as broken:
            found.broken[broken.kind] += 1
            found.first = found.first or f"{record.where or record.key}: {broken}"
        seen(1)
    return found


def sampled_survey(records: Collection[Record]) -> Survey:
    """Estimate the survey of a list that has no broken records from its first few."""
    part = survey(islice(records, _LOOKED_AT), skip_broken=False)
    share = len(records) / max(1, part.samples)
    return Survey(len(records), round(part.tar_bytes * share), part.broken, part.first)


def require_space(folder: Path, tar_bytes: int) -> None:
    """Raises UserError where the disk of `folder` cannot hold shards of so many bytes; those already there count."""
    there = sum(shard.stat().st_size for shard in folder.glob("*.tar"))
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if tar_bytes - there > free:
        raise UserError(
            f"{folder}: the shards need about {size(tar_bytes - there)} and {size(free)} are free; "
            "free some space or write to another disk"
        )


def describe(counts: Counter[str]) -> str:
    """Describe counts, most frequent first: '12 image missing, 3 no caption'."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def size(count: int) -> str:
    """Format bytes for people: '3.2 GB'."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _tar_bytes(image: int, captions: list[str]) -> int:
    """Return the bytes of a sample in a tar: three members, each a header and its content in whole blocks."""
    text = sum(len(caption.encode()) + 4 for caption in captions)
    meta = 150 + text + len(captions[0].encode())
    return sum(_TAR_BLOCK + -(-part // _TAR_BLOCK) * _TAR_BLOCK for part in (image, len(captions[0].encode()), meta))
