#!/usr/bin/env bash
# One node, N processes:  launch/torchrun.sh 8 pretrain CONFIG.yaml [section.key=value ...]
set -euo pipefail
if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 PROCESSES COMMAND CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
processes=$1 command=$2
shift 2
python=${PYTHON:-python}

# What is wrong with settings or data is said once and ends with code 2, before torchrun starts anything.
WORLD_SIZE="$processes" LOCAL_WORLD_SIZE="$processes" "$python" -m llm3d "$command" "$@" --check

# Processes that each take every core get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The next four are launch/slurm.sbatch's, too.
# GPU memory grows by pages instead of by blocks, so that sizes which vary leave no holes; a block that is given back
# to make room waits for all kernels, and those of NCCL may be waiting for another rank.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"
# A rank has a dozen streams: one a communicator, computing, copies. Of those that share one of the 8 hardware queues
# that there are by default, one that waits holds up the others; 32 are the most.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"
# When a collective times out, each rank writes down the last so many of its own; 2,000, the default, may be one step.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-20000}"
# On Ctrl-C and SIGTERM: the time to end a step and save before torchrun kills, as long as Slurm gives (its own default
# is 30 s). After a failure it waits 30 s whatever this says; by then all ranks have ended by themselves.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m llm3d "$command" "$@"
