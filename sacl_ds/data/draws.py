"""Random words as a pure function of what they are for: SHAKE-128 of a few integers.

Every draw about a sample is keyed by (seed, epoch, sample, purpose), so it is the same on any rank, worker and
resumed run. A standard hash never changes between library versions, and costs less than seeding a numpy generator.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def _digest(count_bytes: int, entropy: tuple[int, ...]) -> bytes:
    return hashlib.shake_128(struct.pack(f"<{len(entropy)}Q", *entropy)).digest(count_bytes)


def hash64(data: bytes) -> int:
    """An integer in [0, 2^64) that stands for `data` as entropy, or as the id of what the data name."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def words(count: int, *entropy: int) -> tuple[int, ...]:
    """`count` uniform integers in [0, 2^64); entropy: integers in [0, 2^64)."""
    return struct.unpack(f"<{count}Q", _digest(8 * count, entropy))


def noise_bytes(count: int, *entropy: int) -> np.ndarray:
    """(count,) uint8, uniform."""
    return np.frombuffer(_digest(count, entropy), np.uint8)


def permutation(count: int, *entropy: int) -> np.ndarray:
    """(count,) int64: a uniform permutation."""
    return np.argsort(np.frombuffer(_digest(8 * count, entropy), "<u8"), kind="stable")


def fraction(word: int) -> float:
    """A word as a float in [0, 1)."""
    return (word >> 11) / 2**53
