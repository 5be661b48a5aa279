#!/usr/bin/env bash
# Make the locks anew, with the versions that the tests have. Needs uv: pip install uv
#   base.txt  what every host needs      cuda.txt  and the models, on NVIDIA GPUs      cpu.txt  and the models, on CPUs
# For Linux on x86-64 and ARM, Python 3.11 to 3.13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tested=../../tests/stack/locks/demo.txt
gpu_build='torch|torchaudio|torchcodec|triton'

lock() {
    uv pip compile ../pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header "$@"
}

# whisperx asks for torch 2.8, whose CUDA ctranslate2 can use. The tests run on the torch of their own lock.
grep -vE "^($gpu_build)==" "$tested" >"$work/tested"
lock --constraint "$work/tested" --output-file base.txt
lock --constraint "$work/tested" --extra gpu --output-file cuda.txt

# PyPI's torch needs CUDA. Its CPU builds have an index of their own, and the hashes that stand there:
# https://download.pytorch.org/whl/cpu/torch/
grep -E "^($gpu_build)==" "$tested" >"$work/override"
echo "torchvision; sys_platform == 'none'" >>"$work/override"
lock --constraint "$tested" --override "$work/override" --extra gpu --output-file "$work/cpu.txt"
torch=$(sed -n 's/^torch==//p' "$tested")
{
    echo "torch==$torch+cpu \\"
    sed "s/.*/    --hash=sha256:& \\\\/; \$s/ \\\\//" "torch-$torch+cpu.sha256"
    awk '/^[^ ]/ { skip = /^(torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)(\[[^]]*\])?==/ } !skip' "$work/cpu.txt"
} >cpu.txt
