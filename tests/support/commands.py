"""A subcommand of tools/weight_analysis.py as its command line runs it, in this process."""

from __future__ import annotations

from pathlib import Path

from sacl_ds.analysis import commands
from sacl_ds.command_line import Parser


def analyse(*arguments: str | Path) -> None:
    """Raises UserError as the tool prints it."""
    parser = Parser()
    commands.add_parsers(parser.add_subparsers(required=True))
    options = parser.parse_args([str(argument) for argument in arguments])
    options.act(options)
