"""Page of the doctor: a table of the nodes, and below it what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sacl_ds.doctor.comparison import Examination, Finding
from sacl_ds.doctor.facts import Facts

_COLUMNS = 6  # nodes beside each other; of more, those that are alike are one


def show(seen: Examination, findings: list[Finding], console: Console) -> None:
    """Print the page."""
    console.print(table(seen))
    if seen.all_reduce and not seen.all_reduce.error:
        took = seen.all_reduce
        console.print(
            f"all-reduce of {took.megabytes:.0f} MB over {took.ranks} ranks by {took.backend}: "
            f"{took.bandwidth:.2f} GB/s a rank",
            highlight=False,
        )
    for finding in findings:
        style, word = ("bold red", "wrong") if finding.wrong else ("yellow", "note")
        console.print(Text.assemble((f"{word}: ", style), finding.what), soft_wrap=True)
        console.print(Text(f"  to do: {finding.do}"), soft_wrap=True)
    wrong = sum(finding.wrong for finding in findings)
    ready = f"{len(seen.slots)} node{'s' if seen.several else ''}, {sum(seen.slots.values())} ranks: "
    console.print(ready + (f"{wrong} to be put right" if wrong else "ready"), highlight=False, soft_wrap=True)


def table(seen: Examination) -> Table:
    """Make a table with a row for each known fact and a column for each group of nodes that are alike."""
    columns: dict[tuple[str, ...], dict[str, str]] = {(node,): _cells(seen, node) for node in seen.slots}
    if len(columns) > _COLUMNS:
        columns = _merged(columns)
    made = Table(show_lines=False)
    made.add_column("")
    for nodes in columns:
        made.add_column(nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more", overflow="fold")
    for name in dict.fromkeys(name for cells in columns.values() for name in cells):
        made.add_row(name, *(cells.get(name, "") for cells in columns.values()))
    return made


def _merged(columns: dict[tuple[str, ...], dict[str, str]]) -> dict[tuple[str, ...], dict[str, str]]:
    """Merge the columns of nodes with the same versions, GPUs and shards; figures are those of the first of them."""
    alike: dict[Any, list[tuple[str, ...]]] = {}
    for nodes, cells in columns.items():
        key = tuple((name, value) for name, value in cells.items() if name not in _FIGURES)
        alike.setdefault(key, []).append(nodes)
    return {sum(some, ()): columns[some[0]] for some in alike.values()}


def _gigabytes(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} GB"


_FIGURES = ("clock", "memory free", "/dev/shm free", "disk free")
_ROWS: dict[str, Callable[[Facts], Any]] = {
    "code": lambda facts: facts.git,
    "GPUs": lambda facts: ", ".join(f"{facts.gpus.count(name)} x {name}" for name in dict.fromkeys(facts.gpus)),
    "driver": lambda facts: facts.driver,
    "CUDA": lambda facts: facts.cuda,
    "NCCL": lambda facts: facts.nccl,
    "apex": lambda facts: {"other": "another package", "nvidia": "NVIDIA's"}.get(facts.apex, facts.apex),
    "compiling": lambda facts: facts.missing_tool or "yes",
    "cores": lambda facts: facts.cores,
    "memory": lambda facts: _gigabytes(facts.memory),
    "memory free": lambda facts: _gigabytes(facts.memory_free),
    "/dev/shm free": lambda facts: _gigabytes(facts.shm_free),
    "disk free": lambda facts: _gigabytes(facts.disk_free),
    "shards": lambda facts: facts.shards,
    "samples looked at": lambda facts: sum(facts.samples.values()) or None,
    "sees output_dir": lambda facts: _yes(facts.sees_token),
    "reaches the first": lambda facts: _yes(facts.reaches_master),
}


def _cells(seen: Examination, node: str) -> dict[str, str]:
    """Format what is known of a node, by the names of the table's rows."""
    contact, facts = seen.contacts.get(node), seen.facts.get(node)
    cells: dict[str, Any] = {"ranks": seen.slots[node]}
    if contact:
        cells["ssh"] = "no" if contact.error else "yes"
        cells["clock"] = None if contact.error else f"{contact.clock:+.1f} s"
    if facts:
        cells |= {name: version or "missing" for name, version in facts.versions.items()}
        cells |= {name: of(facts) for name, of in _ROWS.items()}
    return {name: textwrap.shorten(str(value), 60) for name, value in cells.items() if value not in (None, "")}


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"
