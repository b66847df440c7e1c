#!/bin/bash
# The calls for fifteen minutes of a lent GPU without network, at most ten a call, from the repository's root. Before:
#     .venv/bin/python benchmarks/gpu_bench/pack.py .gpu        where git ignores .gpu (.git/info/exclude)
#     bash benchmarks/gpu_bench/lent.sh first                   carry .gpu/one; five minutes
#     bash benchmarks/gpu_bench/lent.sh second WHAT             carry .gpu/two; at once, half a minute of idling ends it
# first: which kernels shall ship (decide.py). WHAT, nine minutes of one of these:
#     heal        95% in ten minutes: two ways to train on much text, four minutes each
#     objectives  a minute for each objective on code, then speed and waiting
#     kernels     errors at every dtype and length, times beside flash attention and cuDNN's, the host's times
# All that is found is under $OUT.
set -o pipefail
export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:.:kernels:benchmarks
HERE=benchmarks/gpu_bench OUT=${OUT:-.}

transfer() { # TRAINING TEXT, then options: code, with the model's halves and the texts held out
    python3 $HERE/transfer.py /tmp/parts .gpu/two/code "$1" --held-out .gpu/two/code-held-out.jsonl.xz \
        --english .gpu/two/english.jsonl.xz "${@:2}" 2>&1 | tee -a "$OUT/transfer.log"
}

case "$1 $2" in
"first ")
    mkdir -p /tmp/parts
    cp .gpu/one/part00 /tmp/parts
    cp .gpu/one/more.jsonl.xz /tmp
    timeout 300 python3 $HERE/decide.py --minutes 4.2 2>&1 | tee "$OUT/decide.log"
    ;;
"second heal" | "second objectives")
    cp .gpu/two/part01 /tmp/parts
    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .gpu/two/wheels/*.whl || exit
    if [ "$2" = heal ]; then
        transfer /tmp/more.jsonl.xz --parts ways --ways 13 14 --seconds 230 --minutes 8
    else
        transfer .gpu/two/code-train.jsonl.xz --ways 0 2 13 9 8 11 10 --seconds 60 --minutes 7.5
    fi
    ;;
"second kernels")
    python3 benchmarks/bench_gpu.py --minutes 5.5 --step-seconds 60 --lengths 1024 4096 16384 --head-dims 64 128 \
        --dtypes bf16 fp16 fp32 --steps check flash triton "triton, plan given" torch eager \
        --output "$OUT/GPU.md" 2>&1 | tee "$OUT/bench.log"
    timeout 180 python3 $HERE/probe.py --head-dims 128 64 --minutes 2.7 2>&1 | tee "$OUT/probe.log"
    ;;
*)
    sed -n '2,/^[^#]/{/^#/p}' "$0"
    exit 2
    ;;
esac
