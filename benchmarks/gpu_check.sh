#!/usr/bin/env bash
# All that a first GPU has to show, with one command, in under ten minutes, without a network: whether the kernels load
# and are right, every device path, training's speed and where its time goes, the tests marked gpu, the kernels' speed,
# compute-sanitizer, text generation, and 7 billion parameters with the optimizer's state in host memory.
#
#   bash benchmarks/gpu_check.sh [OUT]             on a machine with a GPU; results go to OUT (results/gpu beside this)
#   bash benchmarks/gpu_check.sh --pack [DIR]      before, where there is a network and nvcc: what to carry along, into
#                                                  DIR (build/gpu): the packages that a machine with PyTorch may lack,
#                                                  for Python 3.12, and the kernels, built
#   bash benchmarks/gpu_check.sh --dry-run [OUT]   without a GPU: every part's command, tiny, on a stub of CUDA
#   bash benchmarks/gpu_check.sh --list            name, limit in seconds and command of each part
#
# PARTS="7b tests" runs those alone.
#
# A checkout with build/gpu in it is all that the machine needs, beside a Python ($PYTHON) with torch >= 2.10, typer,
# PyYAML, numpy, pytest and hypothesis; pytest-xdist, transformers and pyarrow if they are there. Where the carried
# kernels do not load they are built, which takes nvcc and setuptools, and the last part's time.
#
# Each part is a process of its own under a limit; the limits add up to less than BUDGET seconds. A part that fails or
# hangs does not keep the next from running; one that would end after BUDGET is not started. OUT/verdicts.txt has a
# line or a few for each part as soon as it has ended, OUT/all.txt all that was printed until then, whatever ends this
# script. The exit status says whether all parts passed.
#
# So, here: bash benchmarks/gpu_check.sh --dry-run && bash benchmarks/gpu_check.sh --pack
# and there, with build/gpu: bash benchmarks/gpu_check.sh OUT
set -uo pipefail
cd "$(dirname "$0")/.."
BUDGET=${BUDGET:-540}
MARGIN=10 # seconds that ending takes
carried=${CARRIED:-build/gpu}
python=${PYTHON:-python3}

mode=run
case ${1:-} in --pack | --dry-run | --list) mode=${1#--} && shift ;; esac

# What it takes to go without a network: 9 MB of packages, and 6 MB of libraries.
pack() {
    local site=$1/site
    rm -rf "$1" && mkdir -p "$site" "$1/kernels" || return
    "$python" -m pip install --quiet --no-deps --no-compile --target "$site" --constraint constraints.txt \
        --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 \
        pydantic pydantic_core annotated-types typing-inspection typing_extensions omegaconf || return
    LLM3D_BUILD_CUDA=1 "$python" setup.py --quiet build_ext --inplace || return
    cp llm3d/kernels/*.so "$1/kernels/" && du -sh "$1" "$1"/*
}

if [ "$mode" = pack ]; then
    pack "${1:-build/gpu}"
    exit
fi

# The sizes of the parts: those of a GPU, or as small as they can be.
big=llama-7b small=llama-1b vocabulary=32000 llama3_vocabulary=128256 length=4096 steps=5
tokens=16384 parameters=150000000 rounds=7 context=512 new=128 stub=()
sanitizer=(compute-sanitizer --tool memcheck --error-exitcode 1 --kernel-regex kns=llm3d)
pytest=(-n 8)
if [ "$mode" = dry-run ]; then
    big=llama-tiny small=llama-tiny vocabulary=500 llama3_vocabulary=1000 length=32 steps=1
    tokens=64 parameters=1000 rounds=1 context=8 new=8 stub=(benchmarks/stub_cuda.py)
    sanitizer=() pytest=(--collect-only)
    BUDGET=100000
fi
out=${1:-benchmarks/results/gpu}
verdicts=$out/verdicts.txt all=$out/all.txt
failed=0 child=

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 began=$SECONDS status=0 from printed said
    shift 2
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    [ "$mode" != dry-run ] || limit=$((20 * limit))
    if [ "$mode" = list ]; then
        printf '%s %s' "$name" "$limit" && printf ' %q' "$@" && echo
        return
    fi
    if ((SECONDS + limit > BUDGET - MARGIN)); then
        say "$name" "NOT STARTED: it may take $limit s, and $((BUDGET - MARGIN - SECONDS)) s are left"
        failed=1
        return
    fi
    printf '\n--- %s: %s\n' "$name" "$*" >>"$all"
    from=$(wc -c <"$all")
    # SIGABRT, at which Python says where it was; what it starts is in one process group, and ends with it.
    timeout -s ABRT -k 5 "$limit" "$@" >>"$all" 2>&1 &
    child=$!
    wait "$child" || status=$?
    child=
    printed=$(tail -c +$((from + 1)) "$all")
    said=$(sed -n 's/^=> //p' <<<"$printed")
    [ -n "$said" ] || said=$(grep -v '^ *$\|^Extension modules' <<<"$printed" | tail -n 1)
    case $status in
        0) ;;
        124 | 137) said="STOPPED, its limit is $limit s"$'\n'$said ;;
        *) said="FAILED with status $status"$'\n'$said ;;
    esac
    say "$name" "$said" "$((SECONDS - began)) s"
    if [ "$status" -ne 0 ]; then
        failed=1
        { grep -m 1 -A 9 '^Current thread' <<<"$printed" || tail -n 12 <<<"$printed"; } |
            cut -c 1-200 | sed 's/^/    | /'
    fi
    return "$status"
}

# say NAME TEXT [TIME]: lines that begin with the name, on the screen and in a file
say() {
    local line
    while IFS= read -r line; do
        printf '%-9s %6s  %s\n' "$1" "${3:-}" "$line"
    done <<<"$2" | tee -a "$verdicts"
}

# What was measured stays; what runs is ended.
stopped() {
    [ -z "$child" ] || kill -KILL -- "-$child" 2>/dev/null # timeout leads a process group
    say stopped "by a signal after $SECONDS s"
    exit 3
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
    nvcc --version | grep release
    grep -m 1 'model name' /proc/cpuinfo
    free -g | grep Mem
}

if [ "$mode" != list ]; then
    mkdir -p "$out" && : >"$verdicts" && : >"$all" || exit 2
    trap stopped INT TERM HUP
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    ulimit -c 0
    if [ "$mode" = run ]; then
        PYTHONPATH+=:$PWD/$carried/site
        cp "$carried"/kernels/*.so llm3d/kernels/ 2>/dev/null
        "$python" -c 'import xdist' >/dev/null 2>&1 || pytest=()
        machine 2>&1 | tee -a "$all"
    fi
fi
train=("$python" "${stub[@]}" benchmarks/throughput.py)
llm3d=("$python" "${stub[@]}" -m llm3d)

check=("${llm3d[@]}" kernels --check --device cuda)

LLM3D_KERNELS=native part kernels 30 "${check[@]}"
if [ $? = 2 ]; then # there are none that load
    LLM3D_BUILD_CUDA=1 part build 60 "$python" setup.py --quiet build_ext --inplace
    LLM3D_KERNELS=native part kernels 30 "${check[@]}"
fi
part paths 45 "$python" "${stub[@]}" benchmarks/device_paths.py
part 1b 45 "${train[@]}" "$small" --vocab-size "$vocabulary" --sequence-length "$length" --micro 2 --microbatches 2 \
    --steps "$steps" --then "--micro 4" --then "--set kernels.backend=reference"
part 7b 60 "${train[@]}" "$big" --vocab-size "$vocabulary" --sequence-length "$length" --microbatches 4 \
    --gradients bf16 --steps "$steps" --profile "$out/7b-profile.txt" --trace "$out/7b-trace.json.gz" \
    --then "--set train.deterministic=false"
part variants 60 "${train[@]}" "$small" --sequence-length "$length" --micro 2 --microbatches 2 --steps "$steps" \
    --vocab-size "$llama3_vocabulary" --recompute selective \
    --then "$big --vocab-size $vocabulary --micro 1 --gradients bf16 --recompute selective" \
    --then "$big --vocab-size $vocabulary --micro 1 --gradients bf16 --recompute full"
part tests 75 "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors --tb=short \
    "${pytest[@]}" tests/csrc tests/kernels tests/parity tests/parallel tests/generate tests/stages
part bench 40 "${llm3d[@]}" bench kernels --device cuda --no-compiled --tokens "$tokens" --rounds "$rounds" \
    --parameters "$parameters"
# Every allocation on its own, so that reading beyond one shows; our kernels alone.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 45 "${sanitizer[@]}" "${check[@]}"
part decoding 40 "$python" "${stub[@]}" benchmarks/decoding.py --preset "$small" --vocab-size "$vocabulary" \
    --context "$context" --new-tokens "$new" --graphs on off
part offload 85 "${train[@]}" "$big" --vocab-size "$vocabulary" --sequence-length "$length" --gradients bf16 \
    --recompute full --offload --steps 2
if [ "$mode" != list ]; then
    say all "$([ "$failed" = 0 ] && echo passed || echo 'NOT ALL PASSED') after $SECONDS s"
fi
exit "$failed"
