"""Inspection of a set of shards in one pass, with some 40 bytes of memory a sample."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sacl_ds.data.captions import BadText, captions_of
from sacl_ds.data.images import BadImage, ImageFacts, examine
from sacl_ds.data.shards.patterns import is_remote, stats_path
from sacl_ds.data.shards.tars import PROBLEM, image_of, read_samples
from sacl_ds.errors import UserError
from sacl_ds.files import parsed

LISTED = 20  # broken samples, and shards with wrong stats
EXAMPLES = 3  # of repeated images and captions
_SHARES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
_APART = "apart from other files of its key, which belong beside it in the tar (tar --sort=name)"
_THREADS = 4
_AHEAD = 32


@dataclass(frozen=True, slots=True)
class Example:
    """Sample to be shown, with its image still encoded."""

    shard: str
    key: str
    image: bytes
    captions: list[str]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Count and examples of things that occur more than once. repeated: occurrences beyond the first of each."""

    total: int
    repeated: int
    examples: list[dict[str, Any]]  # most frequent first: times, shard and key of the first two, and the caption

    @property
    def share(self) -> float:
        return self.repeated / max(1, self.total)


@dataclass
class Inspection:
    """Counts of one pass. Counters map a value to how many samples (or captions) have it, so quantiles are exact."""

    shards: list[str] = field(default_factory=list)
    samples: int = 0  # groups of files in the tars, broken ones too
    missing_stats: list[str] = field(default_factory=list)
    wrong_stats: list[dict[str, Any]] = field(default_factory=list)
    unreadable_shards: list[dict[str, str]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)  # by reason
    broken_listed: list[dict[str, str]] = field(default_factory=list)
    image_bytes: array[int] = field(default_factory=lambda: array("Q"))
    widths: Counter[int] = field(default_factory=Counter)  # pixels
    heights: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)  # of each caption
    captions: Counter[int] = field(default_factory=Counter)  # of each sample
    repeated_images: Repeats = field(default_factory=lambda: Repeats(0, 0, []))
    repeated_captions: Repeats = field(default_factory=lambda: Repeats(0, 0, []))
    sheet: list[Example] = field(default_factory=list)
    complete: bool = True  # whether all samples of all shards were looked at

    @property
    def sound(self) -> bool:
        """Whether nothing was found that would stop or falsify training."""
        return not (self.broken or self.wrong_stats or self.unreadable_shards)

    def image_sizes(self) -> dict[str, int]:
        """Quantiles of the sizes of encoded images, in bytes."""
        if not self.image_bytes:
            return {}
        found = np.quantile(np.frombuffer(self.image_bytes, np.uint64), list(_SHARES.values()), method="inverted_cdf")
        return {name: int(value) for name, value in zip(_SHARES, found, strict=True)}

    def summary(self) -> dict[str, Any]:
        """Return all results but the pictures, for JSON."""
        return {
            "shards": len(self.shards),
            "samples": self.samples,
            "complete": self.complete,
            "missing_stats": self.missing_stats,
            "wrong_stats": self.wrong_stats,
            "unreadable_shards": self.unreadable_shards,
            "broken": dict(self.broken),
            "broken_listed": self.broken_listed,
            "image_bytes": {"total": sum(self.image_bytes), **self.image_sizes()},
            "image_width": quantiles(self.widths),
            "image_height": quantiles(self.heights),
            "image_formats": dict(self.formats),
            "caption_words": {**quantiles(self.words), "histogram": dict(sorted(self.words.items()))},
            "captions_per_sample": dict(sorted(self.captions.items())),
            "repeated_images": {**asdict(self.repeated_images), "share": self.repeated_images.share},
            "repeated_captions": {**asdict(self.repeated_captions), "share": self.repeated_captions.share},
        }


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """Return smallest, 5 %, median, 95 % and largest of the values counted (each the smallest that enough reach)."""
    if not counts:
        return {}
    values = sorted(counts)
    reached = np.cumsum([counts[value] for value in values])
    places = np.minimum(np.searchsorted(reached, np.array(list(_SHARES.values())) * reached[-1]), len(values) - 1)
    return {name: values[place] for name, place in zip(_SHARES, places, strict=True)}


def inspect_shards(
    files: Sequence[str],
    limit: int | None = None,
    sheet: int = 0,
    seen: Callable[[int], None] = lambda count: None,
) -> Inspection:
    """Look at all samples, or at `limit`, spread evenly over the shards (the first ones of each).

    sheet: how many examples to keep, drawn evenly over the shards, the same ones each time. seen(n) is called as
    samples are done. What is wrong with the data is counted and listed, never raised.
    """
    found = Inspection(shards=list(files))
    images, captions = _Hashes(files), _Hashes(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, file in enumerate(files):
            quota = None if limit is None else _part(limit, number, len(files))
            shown = _Reservoir(_part(sheet, number, len(files)), seed=number)
            images.next_shard()
            captions.next_shard()
            with_image, parts = 0, set[str]()
            samples = read_samples(file, without_image=True)
            try:
                for fields, future in _in_order(pool, islice(samples, quota)):
                    found.samples += 1
                    with_image += _look(found, file, fields, future, images, captions, shown, parts)
                    seen(1)
                whole = quota is None or (quota > 0 and next(samples, None) is None)
                found.complete &= whole
            except UserError as error:
                found.unreadable_shards.append({"shard": file, "reason": str(error)})
                whole = False
            _check_stats(found, file, with_image if whole else None)
            found.sheet += sorted(shown.kept, key=lambda example: example.key)
    found.repeated_images = images.repeats(_image_of)
    found.repeated_captions = captions.repeats(captions_of)
    return found


def _look(
    found: Inspection,
    file: str,
    fields: dict[str, Any],
    future: Future[ImageFacts] | None,
    images: _Hashes,
    captions: _Hashes,
    shown: _Reservoir,
    parts: set[str],
) -> bool:
    """Counts one sample; returns whether it is one for training, be it a bad one. parts: keys of what the shard had so
    far without picture or caption."""
    key = str(fields["__key__"])
    try:
        said = captions_of(fields)
        reason = "" if said else "no caption"
    except BadText as error:
        said, reason = [], str(error)
    captions.add(said)
    found.captions[len(said)] += 1
    for caption in said:
        found.words[len(caption.split())] += 1
    data = _image_of(fields)
    images.add(data)
    if future is None:
        reason = "no image"
    else:
        found.image_bytes.append(len(data[0]))
        try:
            facts = future.result()
        except BadImage as error:
            reason = f"image does not decode: {error}"
        else:
            found.widths[facts.width] += 1
            found.heights[facts.height] += 1
            found.formats[facts.extension] += 1
    if reason in ("no image", "no caption"):
        reason = _APART if key in parts else reason
        parts.add(key)
    reason = fields.get(PROBLEM, reason)
    if reason:
        found.broken[reason.partition(":")[0]] += 1
        if len(found.broken_listed) < LISTED:
            found.broken_listed.append({"shard": file, "key": key, "reason": reason})
    else:
        shown.offer(Example(file, key, data[0], said))
    return future is not None or PROBLEM in fields


def _check_stats(found: Inspection, file: str, with_image: int | None) -> None:
    """Compare a shard's stats with its content. with_image: samples in the tar, None where it was not read through."""
    if is_remote(file):
        return
    path = stats_path(file)
    if not path.exists():
        found.missing_stats.append(file)
        return
    try:
        says = parsed(path.read_text())["successes"]
    except (OSError, ValueError, KeyError, TypeError):
        says = None
    if says is None or with_image not in (says, None):
        found.wrong_stats.append({"shard": file, "stats": says, "tar": with_image})


def expected_samples(files: Sequence[str]) -> int | None:
    """Sum the samples that the stats files beside the shards state; None if one is missing or unreadable."""
    total = 0
    for file in files:
        try:
            total += int(parsed(Path(stats_path(file)).read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return total


def _in_order(
    pool: ThreadPoolExecutor, samples: Iterator[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Future[ImageFacts] | None]]:
    waiting: deque[tuple[dict[str, Any], Future[ImageFacts] | None]] = deque()
    failure: UserError | None = None
    try:
        for fields in samples:
            data = _image_of(fields)
            waiting.append((fields, pool.submit(examine, data[0]) if data else None))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft()
    except UserError as error:
        failure = error
    yield from waiting  # also those that stand before the place where a shard breaks off
    if failure:
        raise failure


def _image_of(fields: dict[str, Any]) -> list[bytes]:
    data = image_of(fields)
    return [] if data is None or PROBLEM in fields else [data]


def _part(whole: int, number: int, parts: int) -> int:
    """Return the share of part `number` when `whole` is dealt evenly."""
    return whole * (number + 1) // parts - whole * number // parts


class _Reservoir:
    """Reservoir sample of `size` examples, each offered one equally likely."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.offered, self.kept = size, 0, list[Example]()
        self.draws = random.Random(seed)

    def offer(self, example: Example) -> None:
        self.offered += 1
        if len(self.kept) < self.size:
            self.kept.append(example)
        elif self.size and (place := self.draws.randrange(self.offered)) < self.size:
            self.kept[place] = example


class _Hashes:
    """Hashes of things and their samples, 8 bytes each: enough to count repeats and to find examples of them again."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.hashes = array("Q")
        self.ends = array("Q")  # things up to and with each sample
        self.starts: list[int] = []  # the first sample of each shard

    def next_shard(self) -> None:
        self.starts.append(len(self.ends))

    def add(self, things: Sequence[str] | Sequence[bytes]) -> None:
        self.hashes.extend(_hash(thing) for thing in things)
        self.ends.append(len(self.hashes))

    def repeats(self, things_of: Callable[[dict[str, Any]], Sequence[Any]]) -> Repeats:
        hashes = np.frombuffer(self.hashes, np.uint64) if self.hashes else np.zeros(0, np.uint64)
        unique, counts = np.unique(hashes, return_counts=True)
        examples = []
        for index in np.argsort(-counts, kind="stable")[:EXAMPLES]:
            if counts[index] > 1:
                examples.append({"times": int(counts[index]), **self._example(hashes, unique[index], things_of)})
        return Repeats(len(hashes), len(hashes) - len(unique), examples)

    def _example(
        self, hashes: np.ndarray, wanted: np.uint64, things_of: Callable[[dict[str, Any]], Sequence[Any]]
    ) -> dict[str, Any]:
        ends, starts = np.frombuffer(self.ends, self.ends.typecode), np.asarray(self.starts)
        samples = np.unique(np.searchsorted(ends, np.flatnonzero(hashes == wanted), side="right"))[:2]
        at, thing = [], None
        for sample in samples:
            shard = int(np.searchsorted(starts, sample, side="right")) - 1
            earlier = int(sample - starts[shard])
            fields = next(islice(read_samples(self.files[shard], without_image=True), earlier, None))
            at.append({"shard": self.files[shard], "key": str(fields["__key__"])})
            thing = next(thing for thing in things_of(fields) if _hash(thing) == wanted)
        return {"samples": at, **({"caption": thing} if isinstance(thing, str) else {})}


def _hash(thing: str | bytes) -> int:
    data = thing.encode("utf-8", "surrogatepass") if isinstance(thing, str) else thing
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
