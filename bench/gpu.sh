#!/usr/bin/env bash
# Tests and measures the kernels on this machine's GPU, in at most 9 minutes.
#
#   bench/gpu.sh OUTDIR               install, microbenchmark, the host's time, Figure 1, tests on the GPU
#   bench/gpu.sh --sanitize OUTDIR    compute-sanitizer's four tools on a small set of launches
#
# It needs no network and no virtual environment: the packages that pyproject.toml names must be installed already.
# Every stage writes its result to OUTDIR, and a line to OUTDIR/stages.jsonl, before the next begins. A stage that
# fails does not stop the others; the exit code is 1 if any did.
set -u
shopt -s inherit_errexit

BUDGET=${BUDGET:-540} # seconds, for everything
PYTHON=${PYTHON:-python3}

usage() {
    echo "usage: bench/gpu.sh [--sanitize] OUTDIR" >&2
    exit 2
}

sanitize=false
if [ "${1:-}" = --sanitize ]; then
    sanitize=true
    shift
fi
[ $# -eq 1 ] && [ -n "$1" ] && [ "${1#-}" = "$1" ] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
: >"$out/stages.jsonl" || exit 2
unset TRITON_INTERPRET # it would run the kernels on the CPU
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
command=("$PYTHON" -c 'from palkernels.bench.cli import main; main()')
failed=0
SECONDS=0

# stage NAME SECONDS COMMAND...: run with a time limit, within what is left of the budget. At the limit it is interrupted,
# so that it writes what it has.
stage() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS code
    shift 2
    if [ "$left" -lt 5 ]; then
        code=124
        echo "no time left" >"$out/$name.log"
    else
        echo "== $name" >&2
        timeout --signal=INT --kill-after=15 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
        code=$?
        tail -n 5 "$out/$name.log" >&2
    fi
    printf '{"stage": "%s", "exit_code": %d, "seconds": %d}\n' "$name" "$code" "$((SECONDS - start))" >>"$out/stages.jsonl"
    [ "$code" -eq 0 ] || failed=1
    return "$code"
}

stage install 60 "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation -e . || exit 1
stage doctor 60 "${command[@]}" doctor
stage gpu 30 "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())' || exit 1

if $sanitize; then
    # Without PyTorch's own pools, so that each tensor ends where its memory does.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    stage launches 60 "$PYTHON" scripts/launches.py # compiles, so that the tools below watch launches alone
    for tool in memcheck racecheck initcheck synccheck; do
        stage "$tool" 110 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" scripts/launches.py
    done
else
    stage microbench 120 "${command[@]}" microbench --device cuda --audio-tokens 1500 --seconds 0.05 \
        --json "$out/microbench.json"
    stage host 45 "${command[@]}" microbench --host --device cuda --seconds 0.5 --json "$out/host.json"
    # All methods at full size. At the limit it writes the points it has, and --resume goes on with them.
    stage figure1 185 "${command[@]}" figure1 --device cuda --methods all --audio-tokens 512,1500 --repeats 3 \
        --out "$out/figure1"
    # -v names every test as it ends: at the limit the log says which are left.
    stage tests 170 "$PYTHON" -m pytest --device cuda -v --numprocesses 14 --junitxml "$out/tests.xml" \
        tests/attention tests/kernels tests/projection tests/test_recompute.py
fi
echo "results in $out" >&2
exit "$failed"
