#!/bin/sh
# Runs an example on two processes of this machine: ./ddp_torchrun.sh [EXAMPLE.py [FOLDER]]
#
# Without a GPU they speak over gloo. Needs what the example needs; plain_loop.py, accelerate_loop.py and hf_segformer.py
# find out by themselves that torchrun started them.
set -eu
example=${1:-"$(dirname "$0")/plain_loop.py"}
[ $# -eq 0 ] || shift
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A process that is a minute late ends the job, in place of a wait of half an hour.
export PIXCONTRAST_RANK_TIMEOUT="${PIXCONTRAST_RANK_TIMEOUT:-60}"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" "$example" "$@"
