"""Comparison of measurements with the formulas."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scaling.case import PAIRS, Case
from scaling.job import PlannedJob
from scaling.memory import memory
from scaling.wire import total, transfers

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter")
HELD = ("parameters", "optimizer", "at rest", "forward", "peak")
_FIGURES = (*HELD, *COLLECTIVES)
_LATER = ("buckets", "gradients of the share", "block computed again")  # made when backward has begun
_NEGLIGIBLE = 2000  # bytes a step: norms and counters, which no formula follows


def predicted(job: PlannedJob) -> dict[str, float]:
    """Estimate the bytes of a rank under the names that are measured.

    Offloaded bytes count too, since on a CPU it is the same memory.
    """
    of = memory(job)
    all_kept = of.kept | {f"{name}, offloaded": size for name, size in of.host.items()}
    made = transfers(job)
    return {
        "parameters": of.kept["parameters"] + of.kept["parameters that are not trained"] + of.host.get("parameters", 0),
        "optimizer": of.kept.get("optimizer", 0) + of.host.get("optimizer", 0),
        "at rest": sum(all_kept.values()),
        "forward": sum(size for name, size in of.forward.items() if name not in _LATER),
        "peak": of.peak + sum(of.host.values()),
        **{collective: total(made, collective) for collective in COLLECTIVES},
    }


def row_of(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the record: the case, and the most that any of its ranks measured, in bytes.

    ranks: for each rank, what `tools/measure_scaling.py` measured.
    """
    found = {name: max(rank[name] for rank in ranks) for name in _FIGURES if name not in COLLECTIVES}
    alone = case.world == 1  # DeepSpeed calls its collectives all the same; a ring of one sends nothing
    found |= {name: 0 if alone else max(rank["wire"][name] for rank in ranks) for name in COLLECTIVES}
    return {"case": asdict(case), "measured": found}


@dataclass(frozen=True)
class Compared:
    """A row of the record beside the formulas as they are now. ratio: measured / formula, 1 where both are next to
    nothing."""

    case: Case
    measured: dict[str, float]
    ratio: dict[str, float]

    @classmethod
    def of(cls, row: dict[str, Any]) -> Compared:
        case = Case(**row["case"])
        expected = predicted(case.job)
        return cls(case, row["measured"], {name: _ratio(row["measured"][name], expected[name]) for name in _FIGURES})

    @property
    def row(self) -> str:
        """Row of the Markdown table."""
        figures = [_figure(self.measured[name], self.ratio[name]) for name in _FIGURES]
        return f"| {self.case.world} | {self.case.stage} | {_extras(self.case)} | {' | '.join(figures)} |"


def _ratio(measured: float, formula: float) -> float:
    if max(measured, formula) < _NEGLIGIBLE:
        return 1.0
    return measured / formula if formula else float("inf")


def table(rows: list[Compared]) -> str:
    """Format Markdown: a line a case, measured MB and their ratio to the formula."""
    lines = [
        f"| ranks | ZeRO | with | {' | '.join(_FIGURES)} |",
        f"|{' ---: | --- | --- |'}{' ---: |' * len(_FIGURES)}",
    ]
    return "\n".join([*lines, *(row.row for row in rows)]) + "\n"


def worst(rows: list[Compared], names: tuple[str, ...]) -> float:
    """Return the greatest deviation of any of these metrics, as a share."""
    return max(abs(row.ratio[name] - 1) for row in rows for name in names)


def _extras(case: Case) -> str:
    """Describe what sets a case apart from a plain step in float32."""
    parts = f"{case.micro_batches} micro-batches" if case.micro_batches > 1 else ""
    named = {"bf16": case.precision == "bf16", "offload": case.offload, parts: bool(parts)}
    named |= {"coalesced": case.coalesced, "checkpointing": case.checkpointed, "ITC alone": case.itc_alone}
    named[f"{case.pairs} pairs"] = case.pairs != PAIRS
    return ", ".join(name for name, there in named.items() if there)


def _figure(measured: float, ratio: float) -> str:
    return "0" if measured < _NEGLIGIBLE and ratio == 1 else f"{measured / 1e6:.3g}, {ratio:.2f}"
