"""Run the study of patch selection on the built-in scenes: placements and guides, for questions and pre-training.

Trials that are finished in --out are not run again. Prints and writes --out/table.md.
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
        "--plan", type=user_path, default=Path("launch/configs/patches_study.yaml"), help="arms and seeds"
    )
    parser.add_argument("--out", type=user_path, default=Path("runs/study_patches"), help="results and table")
    parser.add_argument("--processes", type=int, help="trials side by side; default: one a core")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds of the plan")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--speed", action="store_true", help="time a training step of each arm, in turn, and no more")
    parser.add_argument(
        "--picture", metavar="ARM", help="train an arm of questions and draw --out/ARM.png, and no more"
    )
    parser.add_argument("--summary", action="store_true", help="run nothing; the table of what is there")
    options = parser.parse_args()
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes {options.processes}: at least 1")

    from patch_study.plan import read_plan
    from patch_study.summary import draw_kept, speed_table, write_table
    from patch_study.tasks import QuestionAnswering
    from patch_study.trial import finished, run_plan, speeds, trained

    plan = read_plan(options.plan).only(options.arms, options.seeds)
    if options.speed:
        print(speed_table(plan, speeds(plan, options.out)))
        return
    if options.picture:
        plan = plan.only([options.picture], None)
        task = trained(plan, options.picture, plan.seeds[0], options.out)
        if not isinstance(task, QuestionAnswering) or not task.model.image_encoder.layers:
            raise UserError(f"--picture {options.picture}: an arm of questions that leaves patches out has one")
        path = options.out / f"{options.picture}.png"
        draw_kept(task, f"{options.picture}, seed {plan.seeds[0]}, held-out scenes", path)
        print(path)
        return
    if not options.summary:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

        def done(trial: tuple[str, int], result: dict[str, object]) -> None:
            figures = {name: round(value, 3) for name, value in result.items() if isinstance(value, float)}
            print(*trial, figures, flush=True)

        run_plan(plan, options.out, options.processes or cores, done)
    print(write_table(plan, finished(plan, options.out), options.out))


if __name__ == "__main__":
    sys.exit(exit_status(main))
