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
# On Ctrl-C: the time to end a step and save, before torchrun kills (its own default is 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m llm3d "$command" "$@"
