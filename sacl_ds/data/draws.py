"""Random numbers as a pure function of their purpose: SHAKE-128 of a few integers.

Every draw about a sample is keyed by (seed, epoch, sample, purpose), so it is the same on any rank, worker and resumed
run. A standard hash never changes between library versions, and costs less than seeding a numpy generator.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def _digest(count_bytes: int, entropy: tuple[int, ...]) -> bytes:
    return hashlib.shake_128(struct.pack(f"<{len(entropy)}Q", *entropy)).digest(count_bytes)


def hash64(data: bytes) -> int:
    """Hash `data` to an integer in [0, 2^64), as entropy or as an id."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def words(count: int, *entropy: int) -> tuple[int, ...]:
    """Draw `count` uniform integers in [0, 2^64). entropy: integers in [0, 2^64)."""
    return struct.unpack(f"<{count}Q", _digest(8 * count, entropy))


def noise_bytes(count: int, *entropy: int) -> np.ndarray:
    """Draw (count,) uniform uint8."""
    return np.frombuffer(_digest(count, entropy), np.uint8)


def permutation(count: int, *entropy: int) -> np.ndarray:
    """Draw a uniform permutation, (count,) int64."""
    return np.argsort(np.frombuffer(_digest(8 * count, entropy), "<u8"), kind="stable")


def fraction(word: int) -> float:
    """Convert a word to a float in [0, 1)."""
    return (word >> 11) / 2**53
