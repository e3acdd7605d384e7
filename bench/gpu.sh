#!/usr/bin/env bash
# Everything a GPU session needs, in one call: build for the GPU at hand, its tests, every benchmark.
#   bench/gpu.sh FOLDER        logs and JSON go to FOLDER
# Needs torch, Triton and the packages of pyproject.toml in the Python that runs (PYTHON=…, default python3).
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
step() { # name, command…: log it, and go on after a failure
    local name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || printf '== %s FAILED (exit %s)\n' "$name" "$?"
}
{
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || arch=
    if [ -n "$arch" ]; then export TORCH_CUDA_ARCH_LIST=$arch; else printf 'no GPU was found; tests will skip\n'; fi
    if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then export SEGVIT_REQUIRE_CUDA=1; fi
    step build "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
    step environment "$python" -m segvit env
    SEGVIT_REQUIRE_EXT=1 step tests "$python" -m pytest -q -m gpu
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [ -n "$sanitizer" ]; then
        for tool in memcheck racecheck synccheck; do
            step "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 \
                "$python" -m pytest -q -m gpu tests/test_token_resample_cuda.py -k "cuda_kernels_on_a_gpu and (44 or 4096)"
        done
    fi
    for bench in bench/*_kernel.py bench/inference.py bench/shrunk.py bench/train_step.py; do
        step "$(basename "$bench" .py)" "$python" "$bench" --out "$out"
    done
} 2>&1 | tee "$out/gpu.log"
! grep ' FAILED (exit ' "$out/gpu.log"
