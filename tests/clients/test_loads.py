"""Tools that measure servers: each has to come to its end with no request that failed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.clients.conftest import ENGINES, MODEL, ROOT, Served, run

REQUESTS = 6
#: What vLLM's command `vllm bench serve` runs; the build for CPUs cannot find its own version, which the command prints.
_VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_aiperf(served: Served, tmp_path: Path) -> None:
    run(
        "aiperf", "profile", "--model", MODEL, "--url", served.root, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", served.directory, "--concurrency", "2", "--request-count", str(REQUESTS), "--ui", "none",
        "--synthetic-input-tokens-mean", "30", "--output-tokens-mean", "8", "--extra-inputs", "ignore_eos:true",
        "--artifact-dir", tmp_path,
    )  # fmt: skip
    told = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert told["request_count"]["avg"] == REQUESTS
    assert not (told.get("error_request_count") or {}).get("avg")
    assert told["time_to_first_token"]["avg"] > 0
    # It makes tokens of the text again, which may be one fewer.
    assert 7 <= told["output_sequence_length"]["avg"] <= 8


def test_guidellm(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    run(
        "guidellm", "run", "--backend", f"kind=openai_http,target={served.root},model={MODEL}",
        "--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={served.directory}",
        "--data", "kind=synthetic_text,prompt_tokens=30,output_tokens=8", "--output", f"kind=json,path={file}",
        "--disable-console",
    )  # fmt: skip
    [measured] = json.loads(file.read_text())["benchmarks"]
    requests = {kind: len(found or ()) for kind, found in measured["requests"].items()}
    assert (requests["successful"], requests["errored"]) == (REQUESTS, 0)
    assert {one["output_metrics"]["text_tokens"] for one in measured["requests"]["successful"]} == {8}


def test_vllms_own(served: Served, tmp_path: Path) -> None:
    for endpoint, kind in (("/v1/chat/completions", "openai-chat"), ("/v1/completions", "openai")):
        command = [
            str(ENGINES), "-c", _VLLM_BENCH, "--backend", kind, "--base-url", served.root, "--endpoint", endpoint,
            "--model", MODEL, "--tokenizer", str(served.directory), "--dataset-name", "random",
            "--random-input-len", "30", "--random-output-len", "8", "--num-prompts", str(REQUESTS), "--ignore-eos",
            "--save-result", "--result-dir", str(tmp_path), "--result-filename", f"{kind}.json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=200)
        assert done.returncode == 0, done.stderr[-3_000:]
        told = json.loads((tmp_path / f"{kind}.json").read_text())
        assert told["completed"] == REQUESTS
        assert told["total_output_tokens"] == REQUESTS * 8
