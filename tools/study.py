"""Run a study of contrastive weightings on the built-in scenes: arms, controls and oracles, over several seeds.

Trials that are finished in --out are not run again, so a study that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sacl_ds.command_line import exit_status
from sacl_ds.config.room import user_path
from sacl_ds.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plan", type=user_path, default=Path("launch/configs/study.yaml"), help="arms and seeds (YAML)"
    )
    parser.add_argument("--out", type=user_path, default=Path("runs/study"), help="results, models, table and plots")
    parser.add_argument("--processes", type=int, help="trials side by side; default: one a core, 4 on a GPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds of the plan")
    parser.add_argument("--arms", nargs="+", help="only these arms and their teachers")
    parser.add_argument("--summary", action="store_true", help="run nothing; table and plots of what is there")
    options = parser.parse_args()
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes {options.processes}: at least 1")

    import torch
    from weight_study.plan import read_plan
    from weight_study.report import StudyProgress, write_summary
    from weight_study.runner import finished, run_plan
    from weight_study.trial import Folder

    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here; leave it out")
    plan = read_plan(options.plan).only(options.arms, options.seeds)
    folder = Folder(options.out)
    if not options.summary:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = options.processes or (4 if device == "cuda" else cores)
        with StudyProgress(plan, finished(plan, folder)) as progress:
            run_plan(plan, folder, processes, device, progress.done)
    print(write_summary(plan, finished(plan, folder), options.out))


if __name__ == "__main__":
    sys.exit(exit_status(main))
