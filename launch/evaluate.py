"""Evaluate a run on its task, or a pre-trained model on retrieval without fine-tuning (zero-shot)."""

import sys

from sacl_ds.command_line import exit_status
from sacl_ds.tasks.configuration import read_evaluation_options

EXAMPLE = "deepspeed launch/evaluate.py checkpoint=runs/vqa-scenes-001"


def main() -> None:
    run = read_evaluation_options(__doc__ or "", EXAMPLE)
    if run is None:
        return
    # after the checks that need no rank: these imports take seconds
    from sacl_ds.tasks.evaluate import evaluate
    from sacl_ds.training.engine import start_process

    device, _ = start_process()
    evaluate(run, device)


if __name__ == "__main__":
    sys.exit(exit_status(main))
