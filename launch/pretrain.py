"""Pre-train an image-text model with the similarity-regulated contrastive loss, matching and masked language."""

import sys

from sacl_ds.command_line import (
    exit_status,
    pretraining_config,
    read_options,
    should_resume,
    training_parser,
    under_supervision,
)
from sacl_ds.config import RunConfig

EXAMPLE = "deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2.json train.steps=1000"


def main() -> int | None:
    options, run = read_options(training_parser(__doc__ or "", EXAMPLE), pretraining_config, RunConfig)
    if run is None:
        return None
    if (status := under_supervision(run)) is not None:
        return status
    # after the checks that need no rank: these imports take seconds
    from sacl_ds.ds_config import read_ds_config

    ds = read_ds_config(options.ds_config)
    from sacl_ds.evaluation.held_out import held_out_evaluator
    from sacl_ds.training.engine import start_process
    from sacl_ds.training.pretrain import pretrain
    from sacl_ds.training.run import Job

    device, machine = start_process()
    pretrain(run, Job(ds, options.ds_config, device, machine, should_resume(options, run)), held_out_evaluator)
    return None


if __name__ == "__main__":
    sys.exit(exit_status(main))
