"""Check whether this node, or every node of a hostfile, is fit to train, and say what to do where not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys

from rich.console import Console

from sacl_ds.command_line import Parser, exit_status
from sacl_ds.config.paths import expanded
from sacl_ds.doctor import reaching
from sacl_ds.doctor.comparison import AllReduce, Examination, Finding, judge
from sacl_ds.doctor.facts import Facts, Request, gather
from sacl_ds.doctor.hosts import read_hostfile, travelling
from sacl_ds.doctor.page import show
from sacl_ds.errors import UserError

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
