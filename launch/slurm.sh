#!/usr/bin/env bash
# sbatch launch/slurm.sh --config launch/configs/sacl.yaml output_dir=/shared/runs/sacl data.shards='...'
#
# One task a GPU, without the deepspeed launcher: launch/pretrain.py takes its rank from the variables set below. 180 s
# before the time limit SLURM sends SIGTERM to the tasks, which write a checkpoint and RUN/status.json, and the job
# queues again; it goes on with --resume wherever RUN has a checkpoint.
#
# SCRIPT=launch/finetune.py starts another script, DS_CONFIG=ds_configs/zero3.json takes another DeepSpeed file.
#SBATCH --job-name=sacl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail

RUN=
for argument in "$@"; do
	case $argument in output_dir=*) RUN=${argument#output_dir=} ;; esac
done
if [ -z "$RUN" ]; then
	echo "error: no output_dir=FOLDER, which all nodes share; a job that queues again must find its run" >&2
	exit 2
fi
if [ -e "$RUN/checkpoints/latest" ] || [ -e "$RUN/teacher/checkpoints/latest" ]; then
	set -- --resume "$@"
fi

NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${NODES%%$'\n'*} # the first
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # of its own, should two jobs meet on a node
export MASTER_ADDR MASTER_PORT
export SCRIPT=${SCRIPT:-launch/pretrain.py} DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

rm -f "$RUN/status.json" # of the time before
status=0
# shellcheck disable=SC2016 # the variables are each task's own
srun --kill-on-bad-exit=1 bash -c '
	export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
	export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
	exec python "$SCRIPT" --ds_config "$DS_CONFIG" "$@"
' task "$@" || status=$?

# what the run says of its end; srun has the first bad status of any task, which tells less
state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$RUN/status.json" 2>/dev/null) ||
	state="no status.json"
echo "run $RUN: $state (srun: status $status)"
if [ "$state" = stopped ]; then
	scontrol requeue "$SLURM_JOB_ID"
	exit 0
fi
exit "$status"
