"""Faults: reasons why a sample was replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sacl_ds.errors import one_line


@dataclass(frozen=True, slots=True)
class SampleFault:
    """Reason why a sample was replaced.

    kind: `bad` cannot be used, `filtered` was not wanted. key: '' where the shard could not be read so far. shard: ''
    for an example of a list, whose key says what it is.
    """

    kind: Literal["bad", "filtered"]
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"shard {self.shard}{', sample ' + self.key if self.key else ''}" if self.shard else self.key
        return one_line(f"{where}: {self.reason}")


class BadSample(ValueError):
    """Raised where a sample cannot be used."""

    def __init__(self, fault: SampleFault) -> None:
        super().__init__(str(fault))
        self.fault = fault
