"""Check whether this node, or every node of a hostfile, is fit to train, and say what to do where not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config.room import expanded
from sacl_ds.doctor import reaching
from sacl_ds.doctor.comparison import AllReduce, Examination, Finding, judge
from sacl_ds.doctor.facts import Facts, Request, gather, read_hostfile, travelling
from sacl_ds.errors import UserError

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


_PORT = 29500


def main() -> None:
    """Print the page, or JSON, and exit with 1 where something must be put right, 2 for a mistake in the command."""
    options = _parser().parse_args()
    if options.node:
        print(reaching.FACTS + json.dumps(gather(Request(**json.loads(options.node))).json()), flush=True)
        return
    seen = _all_nodes(options) if options.hostfile else _this_node(options)
    findings = judge(seen)
    if options.json:
        print(json.dumps(_as_json(seen, findings), indent=2))
    else:
        show(seen, findings, Console())
    if any(finding.wrong for finding in findings):
        sys.exit(1)


def _parser() -> Parser:
    parser = Parser(prog="python -m sacl_ds.doctor", description=__doc__)
    parser.add_argument(
        "--hostfile", type=expanded, metavar="FILE", help="DeepSpeed's: look at all nodes that it names"
    )
    parser.add_argument("--shards", metavar="PATTERN", help="data.shards: are they readable and alike everywhere?")
    parser.add_argument(
        "--allow_missing", type=int, default=0, metavar="N", help="data.allow_missing: gaps in --shards"
    )
    parser.add_argument(
        "--output_dir", type=expanded, metavar="DIR", help="of the run: is it one folder everywhere, with room?"
    )
    parser.add_argument(
        "--master_addr", metavar="ADDRESS", help="as given to deepspeed (default: as deepspeed chooses)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="without a hostfile (default: GPUs, or 2 on a CPU)")
    parser.add_argument("--no_all_reduce", action="store_true", help="leave out the all-reduce over all ranks")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--node", help=argparse.SUPPRESS)  # what is asked of this node, by another doctor
    return parser


def _this_node(options: argparse.Namespace) -> Examination:
    facts = gather(Request(options.output_dir, options.shards, options.allow_missing))
    ranks = options.ranks or len(facts.gpus) or 2
    reduced = None
    if ranks > 1 and not options.no_all_reduce:
        reduced = reaching.all_reduce(["--num_gpus", str(ranks)])
    return Examination({facts.host: ranks}, {facts.host: facts}, output_dir=options.output_dir, all_reduce=reduced)


def _all_nodes(options: argparse.Namespace) -> Examination:
    slots = read_hostfile(options.hostfile)
    contacts = reaching.on_all(slots, reaching.contact)
    answering = [node for node, contact in contacts.items() if contact.error is None]
    try:
        variables, env_error = travelling(), None
    except UserError as error:
        variables, env_error = {}, str(error)
    first = next(iter(slots))
    master, token, token_error = options.master_addr, None, None
    facts: dict[str, Facts] = {}
    errors: dict[str, str] = {}
    if first in answering and not env_error:
        output_dir = os.path.abspath(options.output_dir) if options.output_dir else None
        try:
            master = master or reaching.first_address(first)
        except reaching.Unreached as error:
            errors[first] = str(error)
        if output_dir:
            try:
                token = f".sacl_doctor_{secrets.token_hex(8)}"
                reaching.write_token(first, output_dir, token)
            except reaching.Unreached as error:
                token, token_error = None, str(error)
        try:
            request = Request(output_dir, options.shards, options.allow_missing, token, master, _PORT)
            answers = reaching.on_all(answering, lambda node: _facts_or_error(node, request))
        finally:
            if token and output_dir:
                reaching.remove_token(first, output_dir, token)
        facts = {node: answer for node, answer in answers.items() if isinstance(answer, Facts)}
        errors |= {node: answer for node, answer in answers.items() if isinstance(answer, str)}
    seen = Examination(
        slots,
        facts,
        contacts,
        errors,
        master,
        _PORT,
        options.output_dir,
        token_error,
        reaching.keep_alive(first),
        env_error,
        "GLOO_SOCKET_IFNAME" in variables,
    )
    return dataclasses.replace(seen, all_reduce=_all_reduce(options, seen))


def _facts_or_error(node: str, request: Request) -> Facts | str:
    try:
        return reaching.gather_on(node, request)
    except reaching.Unreached as error:
        return str(error)


def _all_reduce(options: argparse.Namespace, seen: Examination) -> AllReduce | None:
    """Measure an all-reduce, only where all nodes answer and are likely to meet: the launcher would wait for the
    others."""
    meets = all(facts.reaches_master for facts in seen.facts.values())
    if options.no_all_reduce or len(seen.facts) < len(seen.slots) or not meets or sum(seen.slots.values()) < 2:
        return None
    master = ["--master_addr", seen.master] if seen.master else []
    return reaching.all_reduce(["--hostfile", options.hostfile, *master])


def _as_json(seen: Examination, findings: list[Finding]) -> dict[str, object]:
    return {
        "nodes": {
            node: {
                "slots": slots,
                "contact": dataclasses.asdict(seen.contacts[node]) if node in seen.contacts else None,
                "facts": seen.facts[node].json() if node in seen.facts else None,
            }
            for node, slots in seen.slots.items()
        },
        "all_reduce": dataclasses.asdict(seen.all_reduce) if seen.all_reduce else None,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ready": not any(finding.wrong for finding in findings),
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
