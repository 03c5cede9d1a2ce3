"""zfabric: look at a fabric, talk to it, and operate it."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final

import cyclopts
import msgspec
from rich.console import Console

from zfabric.cli.app import make_app, run_app
from zfabric.cli.sampling import NO_FLAGS, Answer, AnswerFlags
from zfabric.cli.serve import serve
from zfabric.cli.settings import CONFIG_VARIABLE
from zfabric.cli.tables import Column, print_json, show
from zfabric.client.blocking import BlockingStream
from zfabric.client.sync import Client
from zfabric.errors import FabricError, RequestError
from zfabric.transport.curve import create_keys
from zfabric.wire.chat import Message

HELP = """Look at a fabric, talk to it, and operate it.

**Examples**

`zfabric serve ./SmolLM2-135M-Instruct`

`zfabric models` · `zfabric workers --json` · `zfabric status`

`zfabric generate chat "The capital of France is" --max-new-tokens 16 --temperature 0`

`zfabric chat smollm2` · `zfabric embed minilm "one text" "another" --json` · `zfabric drain worker-7`

The controller is the one of --endpoint, $ZFABRIC_ENDPOINT, or this host's default. Other settings come from flags, then
ZFABRIC_CLIENT_… variables, then the [client] table of a TOML file, which all commands share. For a controller with
keys, $ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY name this side's secret key file and the controller's public one.
"""

Endpoint = Annotated[str | None, cyclopts.Parameter(help="The controller's endpoint.")]
Transport = Annotated[str | None, cyclopts.Parameter(help="The driver of the socket: libzmq or loop.")]
Json = Annotated[bool, cyclopts.Parameter(name="--json", negative=(), help="Print JSON instead of a table.")]
Config = Annotated[
    Path | None, cyclopts.Parameter(env_var=CONFIG_VARIABLE, help="TOML file; its [client] table holds defaults.")
]
Text = Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True, help="The prompt; - reads it from standard input.")]

#: An answer of a chat may be longer than the fabric's default, and is ended by Ctrl-C if it is too long.
_CHAT_TOKENS: Final = 512
#: Arguments of `Client.operate` itself.
_OWN_ARGUMENTS: Final = frozenset({"worker", "call", "model", "timeout"})
_MODEL_COLUMNS: Sequence[Column] = (
    ("name", lambda row: row.name),
    ("aliases", lambda row: row.aliases),
    ("workers", lambda row: len(row.workers)),
    ("slots", lambda row: row.slots),
    ("running", lambda row: row.in_flight),
    ("queued", lambda row: row.queued),
    ("context", lambda row: row.context_length),
    ("can", lambda row: row.capabilities),
    ("defaults", lambda row: [f"{name}={value:g}" for name, value in row.defaults.items()]),
)
_WORKER_COLUMNS: Sequence[Column] = (
    ("name", lambda row: row.name),
    ("state", lambda row: row.state),
    ("models", lambda row: row.models),
    ("slots", lambda row: row.slots),
    ("running", lambda row: row.in_flight),
    ("tokens/s", lambda row: row.tokens_per_second),
    ("done", lambda row: row.finished),
    ("failed", lambda row: row.failed),
    ("silent ms", lambda row: row.silence_ms),
    ("unread bytes", lambda row: row.buffered_bytes),
    ("up s", lambda row: row.age_s),
)


def build(arguments: list[str]) -> cyclopts.App:
    """The parser with all commands."""
    commands = (models, workers, status, generate, chat, embed, count, drain, operate, keys, serve)
    app = make_app("zfabric", HELP, "client", arguments, shared=_options(commands))
    for command in commands:
        app.command(command)
    return app


def _options(commands: Sequence[Callable[..., int | None]]) -> set[str]:
    """Keys that the [client] table may have: the options of any command."""
    names = {
        parameter.name
        for command in commands
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return {"json", *(f.name for f in fields(AnswerFlags)), *(names - {"as_json", "answer"})}


def models(
    kind: str = "all",
    *,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List models: all, language, multimodal or embedding."""
    with Client(endpoint, transport=transport) as client:
        show(client.models(kind), _MODEL_COLUMNS, as_json=as_json, empty="no models: no worker is registered")


def workers(
    *,
    refresh: bool = False,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List workers. --refresh has them report their load first."""
    with Client(endpoint, transport=transport) as client:
        if refresh:
            client.refresh()
            # What they answer overtakes nothing, so a moment is enough.
            time.sleep(0.05)
        show(client.workers(), _WORKER_COLUMNS, as_json=as_json, empty="no workers")


def status(
    *, endpoint: Endpoint = None, transport: Transport = None, as_json: Json = False, config: Config = None
) -> None:
    """The controller in figures."""
    with Client(endpoint, transport=transport) as client:
        found = client.status()
    if as_json:
        print_json(found)
        return
    rows = [(name, value) for name, value in msgspec.to_builtins(found).items() if name != "transport"]
    rows += sorted(found.transport.items())
    show(rows, (("figure", lambda row: row[0]), ("value", lambda row: str(row[1]))), as_json=False, empty="")


def generate(
    model: str,
    prompt: Text,
    *,
    answer: Answer = NO_FLAGS,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Complete a prompt and print the text as it comes."""
    with Client(endpoint, transport=transport) as client:
        _print_answer(client.stream(model, _prompt(prompt), **answer.given()), as_json=as_json)


def chat(
    model: str,
    message: str | None = None,
    *,
    system: Annotated[str | None, cyclopts.Parameter(help="What the model is told before the first turn.")] = None,
    answer: Answer = NO_FLAGS,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Talk to a chat model: one message, or a conversation until end of input. /reset begins anew, /quit ends."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    sampling = answer.given(max_new_tokens=_CHAT_TOKENS)
    with Client(endpoint, transport=transport) as client:
        if message is not None:
            turn = [*opening, {"role": "user", "content": message}]
            _print_answer(client.stream(model, messages=turn, **sampling), as_json=as_json)
            return
        if as_json:
            raise RequestError("--json needs a message on the command line")
        _converse(client, model, opening, sampling)


def _converse(client: Client, model: str, opening: list[Message], sampling: dict[str, Any]) -> None:
    """Turn by turn. An error or Ctrl-C ends the answer, not the conversation."""
    # Its import alone gives `input` editing and a history; not every Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    console = Console(highlight=False)
    history = list(opening)
    while True:
        try:
            line = console.input("[bold]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        except UnicodeDecodeError as error:
            raise _no_text(error) from None
        if line == "/quit":
            return
        if line == "/reset":
            history = list(opening)
            continue
        if not line:
            continue
        asked = [*history, {"role": "user", "content": line}]
        console.print(f"[bold]{model}[/] ", end="")
        stream: BlockingStream | None = None
        try:
            stream = client.stream(model, messages=asked, **sampling)
            _print_answer(stream, as_json=False)
        except FabricError as error:
            console.print(f"\nerror {error.code}: {error.message}", markup=False)
            continue
        except KeyboardInterrupt:
            if stream is not None:
                stream.close()
            console.print(" …")
            continue
        history = [*asked, {"role": "assistant", "content": stream.text}]


def embed(
    model: str,
    texts: Annotated[list[str], cyclopts.Parameter(help="Texts to embed.")],
    /,
    *,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Vectors of texts."""
    with Client(endpoint, transport=transport) as client:
        rows = client.embed(model, texts)
    if as_json:
        print_json([[float(value) for value in row] for row in rows])
        return
    columns: Sequence[Column] = (
        ("text", lambda row: row[0]),
        ("dimensions", lambda row: len(row[1])),
        ("begins", lambda row: " ".join(f"{value:+.4f}" for value in row[1][:6])),
    )
    show(list(zip(texts, rows, strict=True)), columns, as_json=False, empty="")


def count(
    model: str,
    prompt: Text,
    *,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Tokens of a prompt."""
    with Client(endpoint, transport=transport) as client:
        tokens = client.count_tokens(model, _prompt(prompt))
    print_json({"tokens": tokens} if as_json else tokens)


def drain(
    worker: str,
    *,
    limit_ms: int = 0,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Have a worker finish what it has and leave. --limit-ms 0 is the worker's own limit."""
    with Client(endpoint, transport=transport) as client:
        name = client.drain_worker(worker, limit_ms)
    if as_json:
        print_json({"draining": name})
    else:
        Console().print(f"{name} drains", highlight=False)


def operate(
    worker: str,
    call: str,
    arguments: Annotated[list[str] | None, cyclopts.Parameter(help="name=value; a value may be JSON.")] = None,
    /,
    *,
    model: str = "",
    timeout: Annotated[float | None, cyclopts.Parameter(help="Seconds to wait; two minutes by default.")] = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    config: Config = None,
) -> None:
    """Call an operation of a worker's backend, such as loading an adapter."""
    given: dict[str, Any] = {}
    for argument in arguments or []:
        name, separator, value = argument.partition("=")
        if not separator:
            raise RequestError(f"argument {argument!r} is not of the form name=value")
        if name in _OWN_ARGUMENTS:
            raise RequestError(f"argument {name!r} is not the call's: see zfabric operate --help", parameter=name)
        given[name] = value
        with contextlib.suppress(msgspec.DecodeError):
            given[name] = msgspec.json.decode(value)
    with Client(endpoint, transport=transport) as client:
        print_json(client.operate(worker, call, model=model, timeout=timeout, **given))


def keys(
    name: str,
    /,
    *,
    directory: Annotated[Path, cyclopts.Parameter(help="Where the two files go.")] = Path(),
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Make a key pair: NAME.key for a keyring, or for whoever dials a controller, and NAME.key_secret to keep."""
    public, secret = create_keys(directory, name)
    if as_json:
        print_json({"public": str(public), "secret": str(secret)})
        return
    Console().print(f"public key {public}\nsecret key {secret}", highlight=False, soft_wrap=True)


def _prompt(given: str) -> str:
    try:
        return sys.stdin.read() if given == "-" else given
    except UnicodeDecodeError as error:
        raise _no_text(error) from None


def _no_text(error: UnicodeDecodeError) -> RequestError:
    return RequestError(f"standard input is no text: {error}", parameter="prompt")


def _print_answer(stream: BlockingStream, *, as_json: bool) -> None:
    """Print an answer as it comes, then who made it and how fast; or all of it as JSON."""
    started = time.perf_counter()
    first: float | None = None
    tokens = 0
    for delta in stream:
        first = first or time.perf_counter()
        tokens += len(delta.token_ids) or 1
        if not as_json:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    ended = time.perf_counter()
    ttft_ms = ((first or ended) - started) * 1_000
    rate = (tokens - 1) / (ended - first) if first is not None and tokens > 1 and ended > first else 0.0
    if as_json:
        print_json(
            {
                "text": stream.text,
                "finish_reason": stream.finish_reason,
                "worker": stream.worker,
                "request_id": stream.request_id,
                # An array on the wire, where the protocol names its fields; here names are wanted.
                "usage": msgspec.structs.asdict(stream.usage) if stream.usage is not None else None,
                "ttft_ms": round(ttft_ms, 3),
                "tokens_per_second": round(rate, 1),
            }
        )
        return
    sys.stdout.write("\n")
    Console(stderr=True, highlight=False, style="dim").print(
        f"{stream.worker} · {tokens} tokens · first after {ttft_ms:.1f} ms · {rate:,.0f} tokens/s · {stream.finish_reason}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_app(build, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
