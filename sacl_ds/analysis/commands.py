"""The options of the analysis subcommands. Imports nothing heavy: --help answers at once."""

from __future__ import annotations

import argparse
from typing import Any

from sacl_ds.config.room import expanded

_RAW = argparse.RawDescriptionHelpFormatter
_SUBJECT = "finished run, RUN/checkpoints/step_N, or features saved by --save-features"
_COMPARE_EXAMPLE = """example:
  python tools/weight_analysis.py compare runs/scenes-001 runs/scenes-002 --out compare
  python tools/weight_analysis.py compare runs/scenes-001 teacher"""
_REPORT_EXAMPLE = """example:
  python tools/weight_analysis.py report runs/scenes-001
  python tools/weight_analysis.py report runs/cc3m-002 --against runs/cc3m-001 --shards '/data/val/{000..004}.tar'"""


def data_options(parser: argparse.ArgumentParser, shards: bool = True) -> None:
    """Declare the options that choose pairs and teacher, for `sacl_ds.analysis.inputs.examine`."""
    data = parser.add_argument_group("data")
    if shards:
        data.add_argument(
            "--shards", nargs="+", metavar="PATTERN", help="as data.shards (default: the run's held-out data)"
        )
        data.add_argument(
            "--count", type=int, default=100_000, metavar="N", help="read the first N pairs (default: %(default)s)"
        )
    else:
        parser.set_defaults(shards=None, count=10**9)
    data.add_argument("--teacher", type=expanded, help="as teacher.checkpoint, or 'none' (default: the run's own)")
    data.add_argument(
        "--save-features", type=expanded, metavar="DIR", help="keep the features, to be given in the place of the run"
    )
    data.add_argument("--device", help="default: cuda where there is a GPU, else cpu")


def weight_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the regulation, for `sacl_ds.analysis.inputs.regulation_for`."""
    weights = parser.add_argument_group("weights (default: as at the end of the run)")
    weights.add_argument("--alpha", type=float, help="the teacher's share of the similarity")
    weights.add_argument("--sharpness", type=float, metavar="KAPPA", help="of the model's similarity")
    weights.add_argument("--teacher-sharpness", type=float, metavar="KAPPA", help="of the teacher's")


def add_parsers(subparsers: Any) -> None:
    """Declare scan, calibrate, suspects, detect, report and compare; each sets `act`."""
    _scan(subparsers)
    _calibrate(subparsers)
    _suspects(subparsers)
    _detect(subparsers)
    _report(subparsers)
    _compare(subparsers)


def _parser(subparsers: Any, name: str, purpose: str, example: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name, help=purpose, description=f"{purpose}.", epilog=f"example:\n  {example}", formatter_class=_RAW
    )


def _scan(subparsers: Any) -> None:
    parser = _parser(
        subparsers,
        "scan",
        "the distribution of weights over many mini-batches",
        "python tools/weight_analysis.py scan runs/scenes-001 runs/scenes-002",
    )
    parser.add_argument(
        "paths", nargs="+", type=expanded, metavar="RUN", help=f"{_SUBJECT}; several are shown side by side"
    )
    data_options(parser)
    weight_options(parser)
    drawing = parser.add_argument_group("mini-batches")
    drawing.add_argument("--batches", type=int, default=10_000, metavar="M", help="default: %(default)s, the paper's")
    drawing.add_argument("--batch-size", type=int, default=512, metavar="N", help="default: %(default)s, the paper's")
    drawing.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    _out(parser, "scan")
    parser.set_defaults(act=_act_scan)


def _calibrate(subparsers: Any) -> None:
    parser = _parser(
        subparsers,
        "calibrate",
        "the sharpness at which a share of the negatives falls under a weight",
        "python tools/weight_analysis.py calibrate runs/scenes-001 --share 0.3\n"
        "  python tools/weight_analysis.py calibrate runs/scenes-001 --false-share 0.04",
    )
    parser.add_argument("path", type=expanded, metavar="RUN", help=_SUBJECT)
    data_options(parser)
    wanted = parser.add_argument_group("what is wanted")
    wanted.add_argument("--share", type=float, default=0.2, help="of the negatives (default: %(default)s, the paper's)")
    wanted.add_argument("--under", type=float, default=0.7, help="weight (default: %(default)s, the paper's)")
    wanted.add_argument(
        "--false-share", type=float, metavar="S", help="instead: weights that fall only for this share of most similar"
    )
    wanted.add_argument(
        "--teacher-sharpness", type=float, metavar="KAPPA", help="with it (default: 30, as loss.false_share)"
    )
    drawing = parser.add_argument_group("mini-batches")
    drawing.add_argument("--batches", type=int, default=8, metavar="M", help="default: %(default)s")
    drawing.add_argument("--batch-size", type=int, default=512, metavar="N", help="default: %(default)s")
    drawing.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    _out(parser, "calibration")
    parser.set_defaults(act=_act_calibrate)


def _suspects(subparsers: Any) -> None:
    parser = _parser(
        subparsers,
        "suspects",
        "likely false negatives and duplicates of a whole set, and a grouping of them",
        "python tools/weight_analysis.py suspects runs/cc3m-001 \\\n"
        "      --shards '/data/{00000..00331}.tar' --out suspects.parquet",
    )
    parser.add_argument("path", type=expanded, metavar="RUN", help=_SUBJECT)
    data_options(parser)
    weight_options(parser)
    chosen = parser.add_argument_group("which pairs")
    chosen.add_argument("--weight-under", type=float, default=0.2, help="default: %(default)s")
    chosen.add_argument(
        "--similarity-above",
        type=float,
        metavar="COSINE",
        help="instead: by the teacher's cosine, without one the model's",
    )
    chosen.add_argument("--top", type=int, default=10_000, metavar="N", help="at most so many (default: %(default)s)")
    files = parser.add_argument_group("files")
    files.add_argument("--out", required=True, type=expanded, metavar="FILE", help="suspects.parquet or suspects.csv")
    files.add_argument(
        "--grouping", type=expanded, metavar="FILE", help="parquet for data.grouping: samples that are no negatives"
    )
    files.add_argument(
        "--largest-group", type=int, default=20, metavar="N", help="no group grows past this (default: %(default)s)"
    )
    parser.set_defaults(act=_act_suspects)


def _detect(subparsers: Any) -> None:
    parser = _parser(
        subparsers,
        "detect",
        "the weight as a detector of false negatives, where the truth is known",
        "python tools/weight_analysis.py detect runs/scenes-001\n"
        "  python tools/weight_analysis.py detect runs/coco-001 \\\n"
        "      --coco dataset_coco.json --images coco/",
    )
    parser.add_argument("path", type=expanded, metavar="RUN", help=_SUBJECT)
    data_options(parser, shards=False)
    weight_options(parser)
    truth = parser.add_argument_group("truth")
    truth.add_argument("--scenes", type=int, metavar="N", help="held-out scenes (default: the run's eval_count)")
    truth.add_argument(
        "--coco",
        type=expanded,
        metavar="JSON",
        help="Karpathy's dataset_coco.json: ECCV Caption and CxC (eccv_caption)",
    )
    truth.add_argument("--images", type=expanded, metavar="DIR", help="COCO's images, in or under this folder")
    _out(parser, "detection")
    parser.set_defaults(act=_act_detect)


def _report(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="one HTML file on a run: what its negatives weighed, over training and one by one",
        description="One self-contained HTML file on a run that kept weight records: distribution, course over "
        "training, mutual information, a mini-batch and the lightest negatives with their pictures. Every "
        "picture also as PNG, all numbers as JSON.",
        epilog=_REPORT_EXAMPLE,
        formatter_class=_RAW,
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
    parser.set_defaults(act=_act_report)


def _compare(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="where two runs disagree most about what a negative weighs",
        description="Weights of the same mini-batches under two runs: rank correlation, joint histogram, and the pairs "
        "of anchor and negative whose weights differ most.",
        epilog=_COMPARE_EXAMPLE,
        formatter_class=_RAW,
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
    parser.set_defaults(act=_act_compare)


def _out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--out",
        default=default,
        type=expanded,
        metavar="DIR",
        help="folder for what is written (default: %(default)s)",
    )


def _act_scan(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.scan import act

    act(options)


def _act_calibrate(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.calibrate import act

    act(options)


def _act_suspects(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.suspects import act

    act(options)


def _act_detect(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.detect import act

    act(options)


def _act_report(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.report.building import act

    act(options)


def _act_compare(options: argparse.Namespace) -> None:
    from sacl_ds.analysis.compare import act

    act(options)
