"""Group suspected pairs into samples that are no negatives of each other, with a bound on a group's size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """Groups of samples.

    of: (n,) int64, a number for each sample in a group of at least two, else -1. Numbers count from 0.

    sizes: of the groups, the largest first. refused: links that were left out since a group would have grown past the
    bound. largest_uncapped: the largest group with all links.
    """

    of: np.ndarray
    sizes: list[int]
    refused: int
    largest_uncapped: int


def connected(samples: int, links: np.ndarray, largest: int) -> Groups:
    """Connected components; links (m, 2) int of samples, the strongest first, are taken in their order.

    A link that would make a group of more than `largest` samples is left out: similarity is not transitive, and a chain
    of weak links would else put half of a data set into one group.
    """
    capped, refused = _Forest(samples), 0
    whole = _Forest(samples)
    for a, b in links.tolist():
        whole.join(a, b, samples)
        refused += not capped.join(a, b, largest)
    roots = np.array([capped.root(sample) for sample in range(samples)], np.int64)
    found, place, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    numbers = np.full(len(found), -1, np.int64)
    numbers[sizes > 1] = np.arange(int((sizes > 1).sum()))
    return Groups(numbers[place], sorted(sizes[sizes > 1].tolist(), reverse=True), refused, max(whole.sizes, default=0))


def repeats(values: Sequence[Hashable]) -> np.ndarray:
    """(m, 2) int64: each occurrence of a value after its first, with that first one; '' repeats nothing."""
    first: dict[Hashable, int] = {}
    found = []
    for place, value in enumerate(values):
        if value == "":
            continue
        earlier = first.setdefault(value, place)
        if earlier != place:
            found.append((earlier, place))
    return np.array(found, np.int64).reshape(-1, 2)


def spread(sizes: Sequence[int]) -> str:
    """Describe group sizes: '12 groups of 30 samples: 8 of 2, 3 of 3, the largest of 5'."""
    if not sizes:
        return "no groups"
    counts = sorted(Counter(sizes).items())
    shown = ", ".join(f"{count} of {size}" for size, count in counts[:3])
    more = f", the largest of {counts[-1][0]}" if len(counts) > 3 else ""
    return f"{len(sizes)} groups of {sum(sizes)} samples: {shown}{more}"


class _Forest:
    """Union-find with sizes at the roots."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))
        self.sizes = [1] * count

    def root(self, sample: int) -> int:
        while self._above[sample] != sample:
            self._above[sample] = self._above[self._above[sample]]
            sample = self._above[sample]
        return sample

    def join(self, a: int, b: int, largest: int) -> bool:
        """Unite the groups of both; return whether they are in one group afterwards."""
        a, b = self.root(a), self.root(b)
        if a == b:
            return True
        if self.sizes[a] + self.sizes[b] > largest:
            return False
        if self.sizes[a] < self.sizes[b]:
            a, b = b, a
        self._above[b] = a
        self.sizes[a] += self.sizes[b]
        return True
