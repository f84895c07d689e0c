"""Evaluation of many examples on all ranks: each reads its part once, and all run equally many passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from sacl_ds.data.sample import BadSample, SampleFault
from sacl_ds.distributed import gather_objects, rank, world_size
from sacl_ds.errors import SharedError

Item = TypeVar("Item")
Result = TypeVar("Result")

_READERS = 4  # threads; decoding lets go of the interpreter's lock


class Rounds(NamedTuple, Generic[Result]):
    """Results of all examples. results: one an example, in order, equal on all ranks; None where it could not be read.
    faults: why not."""

    results: list[Result | None]
    faults: list[SampleFault]


def in_rounds(
    count: int,
    batch_size: int,
    read: Callable[[int], Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    filler: Item,
    done: Callable[[int], None] = lambda examples: None,
) -> Rounds[Result]:
    """Apply `run` to examples 0 .. count - 1, each read and run on one rank; every rank calls it.

    read(number) raises BadSample for an example that cannot be used. run: a batch of at most batch_size to one result
    each, which must not depend on what else is in the batch. Under ZeRO 3 a pass is collective, so ranks with fewer
    batches run `filler`, and what comes of it is thrown away. done(n): n examples more are done on this rank.
    """
    mine = range(rank(), count, world_size())
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    rounds = -(-len(range(0, count, world_size())) // batch_size)
    results: list[tuple[int, Result]] = []
    faults: list[SampleFault] = []

    def attempt(number: int) -> Item | SampleFault:
        try:
            return read(number)
        except BadSample as error:
            return error.fault

    with ThreadPoolExecutor(_READERS) as pool:

        def start(turn: int) -> list[Future[Item | SampleFault]]:
            return [pool.submit(attempt, number) for number in batches[turn]] if turn < len(batches) else []

        coming = start(0)
        for turn in range(rounds):
            read_now, coming = coming, start(turn + 1)
            told = [each.result() for each in read_now]
            numbers = batches[turn] if turn < len(batches) else range(0)
            good = [(n, each) for n, each in zip(numbers, told, strict=True) if not isinstance(each, SampleFault)]
            faults += [each for each in told if isinstance(each, SampleFault)]
            given = run([each for _, each in good] or [filler])
            if good:
                results += zip((number for number, _ in good), given, strict=True)
            done(len(told))
    merged: list[Result | None] = [None] * count
    all_faults: list[SampleFault] = []
    for part, wrong in gather_objects((results, faults)):
        all_faults += wrong
        for number, result in part:
            merged[number] = result
    return Rounds(merged, all_faults)


def require_few(
    faults: Sequence[SampleFault], count: int, most: float, setting: str = "data.max_bad_share"
) -> str | None:
    """Count and name examples that could not be used, in a line; None where there is none. Raises SharedError, on every
    rank alike, where they are more than the share `most` of `count`."""
    if not faults:
        return None
    named = "; ".join(map(str, faults[:3])) + ("; ..." if len(faults) > 3 else "")
    line = f"{len(faults)} of {count} examples cannot be used: {named}"
    if len(faults) > most * count:
        raise SharedError(f"{line}; that is more than {setting}={most:g}: put the files there, or raise it")
    return line


def require_finite(values: np.ndarray, names: Sequence[str], what: str) -> None:
    """Raise SharedError, on every rank alike, where a value is NaN or infinite: what is ranked by it says nothing.

    values: (n,) or (n, d), of examples with these names, the same on every rank. what: they are called.
    """
    finite = np.isfinite(values.reshape(len(names), -1)).all(1) if names else np.ones(0, bool)
    wrong = np.flatnonzero(~finite)
    if len(wrong):
        raise SharedError(
            f"{what} of {len(wrong)} of {len(names)} examples are not finite, those of {names[wrong[0]]!r} for one: "
            "the model is damaged, or overflows in this precision; take another checkpoint, or train.precision=fp32"
        )
