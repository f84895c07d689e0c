"""See what the regulation does to the negatives of a data set.

Each subcommand prints a short table and writes machine-readable files beside
its pictures; SUBCOMMAND --help explains one.
"""

import argparse
import os
import sys

from sacl_ds.analysis.commands import add_parsers
from sacl_ds.command_line import Parser, exit_status

EXAMPLE = """example:
  python tools/weight_analysis.py scan runs/scenes-001 --out scan"""


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=raw)
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    add_parsers(subparsers)
    options = parser.parse_args()
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed only reads checkpoints here, and warns where it must guess
    options.act(options)


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
