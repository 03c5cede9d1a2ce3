"""The command line of a vLLM worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zfabric.backends.vllm_engine import arguments
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.cli.worker import _SETTINGS
from zfabric.errors import ConfigurationError


def test_vllms_own_arguments_pass_through(tmp_path: Path) -> None:
    argv = ["--model", str(tmp_path), "--tensor-parallel-size", "2", "--max_num_seqs", "7", "-cc.mode", "0"]
    settings = {
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "max_num_seqs": 9,
        "hf_overrides": {"a": 1},
    }
    parsed = arguments.parse([*argv, "--vllm-stream-interval", "3"], settings)
    engine = parsed.engine
    assert (engine.model, engine.tensor_parallel_size, engine.max_num_seqs) == (str(tmp_path), 2, 7)
    assert (engine.gpu_memory_utilization, engine.enable_prefix_caching) == (0.5, False)
    assert (engine.hf_overrides, engine.stream_interval) == ({"a": 1}, 3)
    assert parsed.names == (tmp_path.name,)


def test_names_adapters_and_template(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    model = ["--model", str(tmp_path)]
    adapters = ["--lora-modules", "x=/x", "y=/y", "--adapters-dir", "/d"]
    parsed = arguments.parse([*model, "--model-names", "a", "b", *adapters, "--chat-template", str(template)], {})
    assert parsed.names == ("a", "b")
    assert parsed.adapters == {"x": "/x", "y": "/y"}
    assert parsed.adapters_dir == Path("/d")
    assert parsed.chat_template == "{{ messages }}"
    assert arguments.parse([*model, "--served-model-name", "s"], {}).names == ("s",)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model is missing"),
        (["--model", "no-such/model"], "model 'no-such/model' cannot be loaded"),
        (["--model", "/", "--warp-speed", "9"], "unrecognized arguments: --warp-speed 9"),
        (["--model", "/", "--max-num-seqs", "many"], "max-num-seqs"),
        (["--model", "/", "--lora-modules", "x"], "NAME=PATH"),
        (["--model", "/", "--chat-template", "/nowhere/at/all"], "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_a_configuration_error(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        arguments.parse(argv, {})


def test_help_lists_vllms_arguments_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        VLLMWorker.from_arguments(["--model", "m", "--vllm-help"], {})
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "--tensor-parallel-size" in output
    assert "--lora-modules" in output


def test_few_settings_of_the_worker_hide_arguments_of_vllms() -> None:
    """The worker's own parser takes its settings first: an engine argument of the same name needs its prefix."""
    from vllm import AsyncEngineArgs

    parser: Any = arguments._parser(AsyncEngineArgs)
    theirs = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    ours = {name.replace("_", "-") for name in _SETTINGS}
    # Another one here would change what a command line means: the documents have to name it.
    assert theirs & ours == {"log-level", "stream-interval"}
    assert not [option for option in theirs if option.startswith(arguments.PREFIX.removeprefix("--"))]
