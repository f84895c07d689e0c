"""`compare A B`: its command line. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
from typing import Any

from sacl_ds.config.paths import expanded

_EXAMPLE = """example:
  python tools/weight_analysis.py compare runs/scenes-001 runs/scenes-002 --out compare
  python tools/weight_analysis.py compare runs/scenes-001 teacher"""


def add_parser(subparsers: Any) -> None:
    """Declare `compare`; sets `act`."""
    parser = subparsers.add_parser(
        "compare",
        help="where two runs disagree most about what a negative weighs",
        description="Weights of the same mini-batches under two runs: rank correlation, joint histogram, and the pairs "
        "of anchor and negative whose weights differ most.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=expanded, metavar="RUN_A", help="finished run, or RUN/checkpoints/step_N")
    parser.add_argument(
        "b", type=expanded, metavar="RUN_B", help="another; or 'teacher': A's model alone against its teacher alone"
    )
    parser.add_argument(
        "--shards", nargs="+", metavar="PATTERN", help="pairs to weigh, as data.shards (default: A's held-out data)"
    )
    parser.add_argument(
        "--count", type=int, default=10_000, metavar="N", help="read the first N pairs (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="pairs in a mini-batch (default: A's train.global_batch_size)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of mini-batches (default: %(default)s)")
    parser.add_argument("--top", type=int, default=50, metavar="K", help="pairs to list (default: %(default)s)")
    parser.add_argument("--sharpness", type=float, metavar="KAPPA", help="for both (default: each as its run ended)")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--out",
        default="compare",
        type=expanded,
        metavar="DIR",
        help="folder for what is written (default: %(default)s)",
    )
    parser.set_defaults(act=_act)


def _act(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.disagreement import act

    act(options)
