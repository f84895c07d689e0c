"""Pre-train a model.

deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json [--config FILE] [--resume] [key=value ...]
"""

import argparse
import os
import sys
from typing import NoReturn

from sacl_ds.config import load_config
from sacl_ds.ds_config import read_ds_config
from sacl_ds.errors import UserError


class Parser(argparse.ArgumentParser):
    """Mistakes as UserError: argparse itself would print its usage once a rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON file, e.g. ds_configs/zero2.json")
    parser.add_argument("--config", help="run configuration (YAML); none: the built-in run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of output_dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=500 data.source=shards")
    return parser.parse_intermixed_args()  # key=value may stand before and after options


def main() -> int:
    try:
        options = arguments()
        run = load_config(options.config, options.overrides)
        ds = read_ds_config(options.ds_config)
        # after the checks that need no rank: these imports take seconds
        from sacl_ds.evaluation.held_out import held_out_evaluator
        from sacl_ds.training.engine import start_process
        from sacl_ds.training.pretrain import Job, pretrain

        device = start_process()
        pretrain(run, Job(ds, options.ds_config, held_out_evaluator, device, options.resume))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
