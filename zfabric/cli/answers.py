"""Commands that ask models: generate, chat, embed, count."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final

import cyclopts
import msgspec
from rich.console import Console

from zfabric.cli.options import Config, Endpoint, Json, Text, Transport
from zfabric.cli.sampling import NO_FLAGS, Answer
from zfabric.cli.tables import Column, print_json, show
from zfabric.client.blocking import BlockingStream
from zfabric.client.sync import Client
from zfabric.errors import FabricError, RequestError
from zfabric.wire.chat import Message

#: An answer of a chat may be longer than the fabric's default, and is ended by Ctrl-C if it is too long.
_CHAT_TOKENS: Final = 512


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
    """Complete a prompt and print the text as it comes.

    **Examples**

    `zfabric generate smollm2 "Once upon a time" --max-new-tokens 32` · `echo "a prompt" | zfabric generate smollm2 - --json`
    """
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
    """Talk to a chat model: one message, or a conversation until end of input. /reset begins anew, /quit ends.

    **Examples**

    `zfabric chat smollm2` · `zfabric chat smollm2 "Hello!" --system "Be brief." --json`
    """
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
    """Vectors of texts.

    **Examples**

    `zfabric embed minilm "one text" "another" --json`
    """
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
    """Tokens of a prompt.

    **Examples**

    `zfabric count smollm2 "Once upon a time"`
    """
    with Client(endpoint, transport=transport) as client:
        tokens = client.count_tokens(model, _prompt(prompt))
    print_json({"tokens": tokens} if as_json else tokens)


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
