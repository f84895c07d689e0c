"""Fine-tune a pre-trained model for retrieval, VQA or NLVR2, and evaluate the best weights."""

import sys

from sacl_ds.command_line import exit_status, should_resume, under_supervision
from sacl_ds.tasks.configuration import read_finetune_options

EXAMPLE = "deepspeed launch/finetune.py --task vqa --ds_config ds_configs/zero2.json checkpoint=runs/scenes-001"


def main() -> int | None:
    options, run = read_finetune_options(__doc__ or "", EXAMPLE)
    if run is None:
        return None
    if (status := under_supervision(run)) is not None:
        return status
    # after the checks that need no rank: these imports take seconds
    from sacl_ds.ds_config import read_ds_config

    ds = read_ds_config(options.ds_config)
    from sacl_ds.tasks.finetune import finetune
    from sacl_ds.training.engine import start_process
    from sacl_ds.training.run import Job

    device, machine = start_process()
    finetune(run, Job(ds, options.ds_config, device, machine, should_resume(options, run)))
    return None


if __name__ == "__main__":
    sys.exit(exit_status(main))
