#!/usr/bin/env bash
# All that needs a GPU, with one command and without a network: the gpu tests, then throughput.
#   bash benchmarks/gpu_check.sh [RESULTS_DIRECTORY]
# Needs Python with torch and llm3d's dependencies; llm3d itself is taken from this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
mkdir -p "$results"
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'
} | tee "$results/machine.txt"
"$python" -m pytest -m gpu -q -p no:cacheprovider tests | tee "$results/tests.txt"
for recompute in none selective full; do
    "$python" benchmarks/throughput.py llama-1b --sequence-length 4096 --micro 2 --microbatches 2 \
        --recompute "$recompute" | tee "$results/throughput-llama-1b-$recompute.json"
done
