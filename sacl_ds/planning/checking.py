"""What was measured, beside what the formulas say."""

from __future__ import annotations

from typing import Any

from sacl_ds.planning.job import Job
from sacl_ds.planning.memory import memory
from sacl_ds.planning.wire import total, transfers

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter")
_FIGURES = ("parameters", "optimizer", "at rest", "forward", "peak", *COLLECTIVES)
_LATER = ("buckets", "gradients of the share", "block computed again")  # made when backward has begun
_NEGLIGIBLE = 1000  # bytes a step: norms and counters, which no formula follows


def predicted(job: Job) -> dict[str, float]:
    """Bytes of a rank by the formulas, under the names that are measured: what offloading takes counts too, since on a
    CPU it is the same memory."""
    of = memory(job)
    all_kept = of.kept | {f"{name}, offloaded": size for name, size in of.host.items()}
    made = transfers(job)
    return {
        "parameters": of.kept["parameters"] + of.host.get("parameters", 0),
        "optimizer": of.kept.get("optimizer", 0) + of.host.get("optimizer", 0),
        "at rest": sum(all_kept.values()),
        "forward": sum(size for name, size in of.forward.items() if name not in _LATER),
        "peak": of.peak + sum(of.host.values()),
        **{collective: total(made, collective) for collective in COLLECTIVES},
    }


def compared(job: Job, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """measured: the greatest of the ranks, in bytes; formula; ratio: measured / formula, 1 where both are next to
    nothing. ranks: of each what `tools/measure_scaling.py` measured."""
    expected = predicted(job)
    found = {name: max(rank[name] for rank in ranks) for name in _FIGURES if name not in COLLECTIVES}
    alone = job.world == 1  # DeepSpeed calls its collectives all the same; a ring of one sends nothing
    found |= {name: 0 if alone else max(rank["wire"][name] for rank in ranks) for name in COLLECTIVES}
    ratios = {name: _ratio(found[name], expected[name]) for name in _FIGURES}
    return {"measured": found, "formula": expected, "ratio": ratios}


def _ratio(measured: float, formula: float) -> float:
    if max(measured, formula) < _NEGLIGIBLE:
        return 1.0
    return measured / formula if formula else float("inf")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a case, measured MB and their ratio to the formula."""
    lines = [
        f"| ranks | ZeRO | with | {' | '.join(_FIGURES)} |",
        f"|{' ---: | --- | --- |'}{' ---: |' * len(_FIGURES)}",
    ]
    usual = rows[0]["case"]["pairs"]
    for row in rows:
        case = row["case"]
        figures = [_figure(row["measured"][name], row["ratio"][name]) for name in _FIGURES]
        lines.append(f"| {case['world']} | {case['stage']} | {_extras(case, usual)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _extras(case: dict[str, Any], usual: int) -> str:
    """What sets a case apart from a plain step in float32. usual: pairs a rank."""
    parts = f"{case['micro_batches']} micro-batches" if case["micro_batches"] > 1 else ""
    named = {"bf16": case["precision"] == "bf16", "offload": case["offload"], parts: bool(parts)}
    named |= {"coalesced": case["coalesced"], "checkpointing": case["checkpointed"]}
    named[f"{case['pairs']} pairs"] = case["pairs"] != usual
    return ", ".join(name for name, there in named.items() if there)


def _figure(measured: float, ratio: float) -> str:
    return "0" if measured < _NEGLIGIBLE and ratio == 1 else f"{measured / 1e6:.3g}, {ratio:.2f}"
