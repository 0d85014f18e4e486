#!/usr/bin/env bash
# All that needs a GPU, with one command, without a network, in under ten minutes: builds the kernels, runs their
# tests and the others marked gpu, compute-sanitizer, the kernels' speed, and training's; and a step of 7 billion
# parameters with the optimizer's state in host memory (of which it takes 75 GiB).
#   bash benchmarks/gpu_check.sh [RESULTS_DIRECTORY]
# Needs nvcc and a Python ($PYTHON) with torch, setuptools, pytest, hypothesis and typer; training also needs pydantic
# and OmegaConf, and PPO's tests transformers, which may lie on PYTHONPATH. llm3d itself is taken from this checkout.
# A part that fails does not keep the next from running; the last lines say which did, and so does the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" LLM3D_BUILD_CUDA=1
mkdir -p "$results"
summary=() failed=0

# part NAME SECONDS COMMAND...: what the command prints goes to RESULTS_DIRECTORY/NAME.txt
part() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    echo "--- $name"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.txt" || status=$?
    summary+=("$(printf '%-24s %4d s  exit status %d' "$name" $((SECONDS - began)) "$status")")
    [ "$status" -eq 0 ] || failed=1
}

has() { "$python" -c "import $1" 2>/dev/null; }

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv &&
        nvcc --version | grep release &&
        "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)
assert torch.cuda.is_available(), "no CUDA device"'
}


machine | tee "$results/machine.txt" || exit 2
part build 240 "$python" setup.py --quiet build_ext --inplace
part kernels 60 "$python" -m llm3d kernels --check --device cuda
part kernel-tests 180 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/csrc tests/kernels
part bench-kernels 200 "$python" -m llm3d bench kernels --device cuda --tokens 16384 --rounds 21
for tool in memcheck racecheck; do
    # Every allocation on its own, so that reading beyond one shows; our kernels alone.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --kernel-regex kns=llm3d "$python" -m llm3d kernels --check --device cuda
done
if has pydantic && has omegaconf; then
    part training-tests 120 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/parity tests/parallel
    for kernels in native reference; do
        LLM3D_KERNELS=$kernels part "throughput-llama-1b-$kernels" 60 "$python" benchmarks/throughput.py llama-1b \
            --sequence-length 4096 --micro 2 --microbatches 2
    done
    part generation-tests 60 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/generate
    if has transformers; then
        part ppo-tests 90 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/stages
    else
        summary+=("PPO's tests: not run, for transformers is not installed")
    fi
    for preset in llama-1b llama-7b; do
        part "decoding-$preset" 90 "$python" benchmarks/decoding.py --preset "$preset"
    done
    part decoding-llama-1b-no-graphs 60 "$python" benchmarks/decoding.py --preset llama-1b --no-graphs
    part training-7b-offload 150 "$python" benchmarks/throughput.py llama-7b --sequence-length 4096 --micro 1 \
        --recompute selective --gradients bf16 --offload --steps 3 --trace "$results/training-7b-offload.json"
    gzip -f "$results/training-7b-offload.json" 2>/dev/null
else
    summary+=("training: not run, for pydantic or OmegaConf is not installed")
fi
printf '%s\n' "${summary[@]}" | tee "$results/summary.txt"
exit "$failed"
