"""The command line of a vLLM worker: vLLM's own engine arguments, and a few of ours.

Where one has the name of a setting of the worker's own, such as --log-level, vLLM's is given as --vllm-log-level.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from zfabric.backends.front.parsing.formats import AUTO
from zfabric.backends.vllm_engine.compat.environment import argument_parser, prepare_environment
from zfabric.errors import ConfigurationError

#: Tells vLLM's arguments from the worker's own, where need be.
PREFIX: Final = "--vllm-"
#: Lists vLLM's arguments; --help lists the worker's own.
HELP: Final = f"{PREFIX}help"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a worker is made from.

    Attributes:
        engine: vLLM's `AsyncEngineArgs`.
        names: Names the model is served under; the first is the model, the others aliases.
        chat_template: Text of a chat template instead of the model's own.
        adapters: LoRA adapters: name → directory.
        adapters_dir: Directory of adapters that are loaded when somebody asks for one.
        tool_parser, reasoning_parser: How calls and reasoning are written: auto, none, or the name of a format.
        tell_cache: Tell the controller which blocks are cached.
    """

    engine: Any
    names: tuple[str, ...]
    chat_template: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    adapters_dir: Path | None = None
    tool_parser: str = AUTO
    reasoning_parser: str = AUTO
    tell_cache: bool = False


def parse(argv: Sequence[str], settings: Mapping[str, Any]) -> Arguments:
    """Read a command line. Imports vLLM, which takes seconds.

    Args:
        argv: What the worker's own parser left over.
        settings: The same from a file: a key for each flag, with underscores; flags go before.

    Raises:
        ConfigurationError: vLLM's parser refuses something, or a file cannot be read.
    """
    prepare_environment()
    from vllm import AsyncEngineArgs

    parser = _parser(AsyncEngineArgs)
    given = parser.parse_args([_unprefixed(argument) for argument in (*as_flags(settings), *argv)])
    if not given.model:
        raise ConfigurationError("--model is missing: a directory, or a name that vLLM can find")
    names = tuple(given.model_names or given.served_model_name or [Path(given.model).name])
    # vLLM's own setting of this name says it for our parsers too; its engine is told the name once it is known.
    reasoning_parser, given.reasoning_parser = given.reasoning_parser or AUTO, ""
    try:
        engine = AsyncEngineArgs.from_cli_args(given)
    except (OSError, ValueError) as error:
        # Offline, names of models are looked up here.
        raise ConfigurationError(f"model {given.model!r} cannot be loaded: {error}", model=given.model) from error
    return Arguments(
        engine=engine,
        names=names,
        chat_template=_template(given.chat_template),
        adapters=dict(_adapter(text) for text in given.lora_modules),
        adapters_dir=given.adapters_dir,
        tool_parser=given.tool_parser,
        reasoning_parser=reasoning_parser,
        tell_cache=given.tell_cache,
    )


def print_help() -> None:
    """List all arguments on standard output."""
    prepare_environment()
    from vllm import AsyncEngineArgs

    _parser(AsyncEngineArgs).print_help()


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """A file's table as a command line."""
    flags: list[str] = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *(str(item) for item in value)]
        elif isinstance(value, dict):
            flags += [f"--{name}", json.dumps(value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _unprefixed(argument: str) -> str:
    return argument.replace(PREFIX, "--", 1) if argument.startswith(PREFIX) else argument


def _parser(engine_arguments: Any) -> Any:
    parser = argument_parser(
        prog="zfabric-worker --backend vllm", add_help=False, allow_abbrev=False, description="vLLM's engine arguments."
    )
    # The parser would end the process, from within a thread.
    parser.error = _refuse
    parser = engine_arguments.add_cli_args(parser)
    # The default is a model from a hub, which nobody asked for.
    parser.set_defaults(model=None)
    ours = parser.add_argument_group("zfabric")
    ours.add_argument("--model-names", nargs="+", action="extend", default=[], help="Names it is served under.")
    ours.add_argument("--chat-template", help="File with a Jinja chat template, instead of the model's own.")
    ours.add_argument(
        "--lora-modules", nargs="+", action="extend", default=[], metavar="NAME=PATH",
        help="LoRA adapters, each served under its name; needs --enable-lora.",
    )  # fmt: skip
    ours.add_argument(
        "--adapters-dir", type=Path, metavar="DIR",
        help="Directory of LoRA adapters that are loaded when somebody asks for one, each a directory of its own there; needs "
        "--enable-lora.",
    )  # fmt: skip
    ours.add_argument(
        "--tool-parser", default=AUTO, metavar="NAME",
        help="How tool calls are written: auto tells it by the chat template, none leaves them in the text. "
        "--reasoning-parser is the same for reasoning.",
    )  # fmt: skip
    ours.add_argument(
        "--tell-cache", action="store_true",
        help="Tell the controller which blocks of prompts the prefix cache has, for its policy prefix_aware.",
    )  # fmt: skip
    return parser


def _refuse(message: str) -> NoReturn:
    raise ConfigurationError(f"vllm's arguments: {message}")


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"chat template {path} cannot be read: {error}") from error


def _adapter(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ConfigurationError(f"--lora-modules is {text!r}, it must be of the form NAME=PATH")
    return name, path
