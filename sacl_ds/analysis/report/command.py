"""`report RUN`: its command line. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
from typing import Any

from sacl_ds.config.paths import expanded

_EXAMPLE = """example:
  python tools/weight_analysis.py report runs/scenes-001
  python tools/weight_analysis.py report runs/cc3m-002 --against runs/cc3m-001 --shards '/data/val/{000..004}.tar'"""


def add_parser(subparsers: Any) -> None:
    """Declare `report`; sets `act`."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML file on a run: what its negatives weighed, over training and one by one",
        description="One self-contained HTML file on a run that kept weight records: distribution, course over "
        "training, mutual information, a mini-batch and the lightest negatives with their pictures. Every "
        "picture also as PNG, all numbers as JSON.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=expanded, metavar="RUN",
        help="run directory, finished or not, with weights/ (records.every); or RUN/checkpoints/step_N, as far as that",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=expanded, metavar="RUN_B", help="finished run or checkpoint: retrieval of both side by side"
    )
    parser.add_argument(
        "--shards", nargs="+", metavar="PATTERN", help="held-out pairs, as data.eval_shards (default: the run's own)"
    )
    parser.add_argument(
        "--pairs", type=int, default=1000, metavar="N", help="read the first N held-out pairs (default: %(default)s)"
    )
    parser.add_argument("--teacher", type=expanded, help="as teacher.checkpoint, or 'none' (default: the run's own)")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--out",
        type=expanded,
        metavar="DIR",
        help="folder for what is written (default: RUN/report, or RUN/report_step_N)",
    )
    parser.set_defaults(act=_act)


def _act(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.report.building import act

    act(options)
