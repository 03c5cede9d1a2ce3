"""The promises that `conformance` asks for, each as a question to a client."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from zfabric.errors import (
    ContextOverflowError,
    DeadlineExceededError,
    RequestError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.limits import WINDOW_UNITS
from zfabric.testing.asking import Asked, BrokenPromise, NotAsked, Promise, expect
from zfabric.wire.sampling import ALL_PARAMETERS

if TYPE_CHECKING:
    from zfabric.client.results import Completion

#: Longer prompts are made of no model for this.
_CONTEXT_MAX: Final = 100_000
#: A value of each parameter that is not its default, for models that do not honour it.
_OTHERS: Final[dict[str, Any]] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repetition_penalty": 1.2, "stop": ["zq"], "seed": 5, "n": 2, "logprobs": 1, "echo": True, "logit_bias": {1: 1.0},
    "guided_regex": "a+", "use_beam_search": True,
}  # fmt: skip


async def _pieces_are_the_whole(asked: Asked) -> None:
    stream = asked.client.stream(asked.model, asked.prompt, **asked.same())
    texts, tokens, reasons = [], 0, []
    async for delta in stream:
        texts.append(delta.text)
        tokens += len(delta.token_ids)
        reasons += [delta.finish_reason] if delta.finish_reason else []
    whole = await stream.collect()
    expect("".join(texts) == whole.text, f"the pieces are {''.join(texts)!r}, the whole is {whole.text!r}")
    expect(len(reasons) == 1, f"the answer has the ends {reasons}, it must have one")
    expect(not tokens or tokens == len(whole.token_ids), f"{tokens} tokens came, the whole has {len(whole.token_ids)}")


async def _length_is_kept(asked: Asked) -> None:
    for limit in (1, 4):
        made = await asked.answer(max_new_tokens=limit)
        usage = made.usage.completion_tokens
        expect(usage <= limit, f"max_new_tokens={limit} gave {usage} tokens")
        expect(len(made.token_ids) <= limit, f"max_new_tokens={limit} gave {len(made.token_ids)} token ids")
        expect(made.finish_reason in ("length", "stop"), f"max_new_tokens={limit} ended with {made.finish_reason!r}")


async def _usage_is_told(asked: Asked) -> None:
    made = await asked.answer()
    usage = made.usage
    expect(usage.prompt_tokens > 0 or usage.estimated, f"usage is {usage}")
    if made.token_ids:
        expect(usage.completion_tokens == len(made.token_ids), f"{len(made.token_ids)} tokens came, {usage} was told")
    if "count_tokens" in asked.status.capabilities:
        counted = await asked.client.count_tokens(asked.model, asked.prompt)
        expect(counted == usage.prompt_tokens, f"count_tokens says {counted}, the usage {usage.prompt_tokens}")


async def _greedy_is_the_same(asked: Asked) -> None:
    first, again = await asked.answer(), await asked.answer()
    expect(first.text == again.text, f"temperature=0 gave {first.text!r}, then {again.text!r}")


async def _neighbours_change_nothing(asked: Asked) -> None:
    alone = await asked.answer()
    together = await asyncio.gather(*(asked.answer() for _ in range(4)))
    for made in together:
        expect(made.text == alone.text, f"alone it was {alone.text!r}, beside others {made.text!r}")


async def _a_seed_is_an_answer(asked: Asked) -> None:
    options: dict[str, Any] = {"temperature": 1.0} if asked.takes("temperature") else {}
    first, again = [await asked.answer(seed=11, **options) for _ in range(2)]
    expect(first.text == again.text, f"seed=11 gave {first.text!r}, then {again.text!r}")


async def _stop_strings_end(asked: Asked) -> None:
    free = (await asked.answer()).text
    if len(free) < 3:
        raise NotAsked(f"its answer is {free!r}")
    stop = free[len(free) // 2 :][:2]
    made = await asked.answer(stop=[stop])
    wanted = free[: free.index(stop)]
    expect(made.text == wanted, f"{free!r} with stop={stop!r} gave {made.text!r} instead of {wanted!r}")
    expect(made.finish_reason == "stop", f"an answer that a stop string ended has the reason {made.finish_reason!r}")
    told = made.choices[0].stop_reason
    expect(told in (None, stop), f"an answer that stop={stop!r} ended has the stop_reason {told!r}")


async def _all_choices_end(asked: Asked) -> None:
    made = await asked.client.generate(asked.model, asked.prompt, max_new_tokens=4, n=3)
    reasons = [choice.finish_reason for choice in made.choices]
    expect(len(reasons) == 3 and all(reasons), f"n=3 gave choices that ended with {reasons}")


async def _echo_begins_with_the_prompt(asked: Asked) -> None:
    made = await asked.answer(echo=True)
    expect(made.text.startswith(asked.prompt), f"echo=True gave {made.text!r}")


async def _parameters_are_refused_by_name(asked: Asked) -> None:
    known = asked.status.parameters
    if known is None:
        raise NotAsked("the model does not tell which it honours")
    for name in sorted(ALL_PARAMETERS - set(known)):
        if name not in _OTHERS:
            continue
        try:
            await asked.client.generate(asked.model, asked.prompt, max_new_tokens=1, **{name: _OTHERS[name]})
        except UnsupportedParameterError as error:
            expect(name in error.message, f"the refusal of {name} says {error.message!r}")
        else:
            raise BrokenPromise(f"{name} is not announced, and was taken without a word")


async def _unknown_keys_are_refused_by_name(asked: Asked) -> None:
    if asked.status.extra is None:
        raise NotAsked("the model takes any")
    name = "of-no-engine"
    try:
        await asked.client.generate(asked.model, asked.prompt, max_new_tokens=1, extra={name: 1})
    except UnsupportedParameterError as error:
        expect(name in error.message, f"the refusal of {name} says {error.message!r}")
    else:
        raise BrokenPromise(f"{name} was taken without a word")


async def _odd_prompts_have_an_answer_or_an_error(asked: Asked) -> None:
    for prompt in (" ", "\0", "é🙂" * 8, "a" * 300):
        try:
            await asked.answer(prompt)
        except RequestError:
            continue
    await asked.answer()


async def _too_long_is_told(asked: Asked) -> None:
    length = asked.status.context_length
    if not 0 < length <= _CONTEXT_MAX:
        raise NotAsked(f"its context is {length or 'not known'}")
    try:
        await asked.answer("word " * (length + 10))
    except ContextOverflowError as error:
        expect(error.details.get("context_length") == length, f"the error says {error.details}, the model {length}")
    else:
        raise BrokenPromise(f"a prompt of {length + 10} words was taken, the context is {length}")


async def _a_cancel_frees_the_slot(asked: Asked) -> None:
    slots = min(max(asked.status.slots, 1), 8)
    for _ in range(2):
        streams = [
            asked.client.stream(asked.model, asked.prompt, **asked.same(max_new_tokens=None)) for _ in range(slots)
        ]
        for stream in streams:
            async for _delta in stream:
                break
            await stream.aclose()
    await asked.answer()


async def _a_deadline_ends(asked: Asked) -> None:
    with contextlib.suppress(DeadlineExceededError):
        await asked.client.generate(asked.model, asked.prompt, **asked.same(max_new_tokens=None), deadline_ms=30)
    await asked.answer()


async def _resumes_where_it_broke_off(asked: Asked) -> None:
    """As another worker would be asked, of which the client has the first half of the answer."""
    stream = asked.client.stream(asked.model, asked.prompt, **asked.same())
    deltas = [delta async for delta in stream]
    whole = await stream.collect()
    half, characters = 0, 0
    for delta in deltas[: len(deltas) // 2]:
        half += len(delta.token_ids)
        characters += len(delta.text)
    if not half:
        # It came as one piece: then its reader is one that has tokens, and no text of them yet.
        half = len(whole.token_ids) // 2
    expect(half, "the answer has no token ids, so nothing can be continued")
    rest = await _continued(asked, whole, half, characters)
    wanted = whole.text[characters:]
    expect(
        rest.text == wanted, f"after {whole.text[:characters]!r} it went on with {rest.text!r} instead of {wanted!r}"
    )
    told, usage = whole.usage.completion_tokens, rest.usage.completion_tokens
    expect(usage == told, f"the usage of the continued answer has {usage} tokens, of the whole one {told}")


async def _continued(asked: Asked, whole: Completion, tokens: int, characters: int) -> Completion:
    from zfabric.client.mailbox import Collector
    from zfabric.client.requests import generate_request
    from zfabric.core.client.bodies import encoded
    from zfabric.core.client.pending import Pending
    from zfabric.limits import FRAME_BYTES_MAX
    from zfabric.transport.clock import monotonic_ns

    connection = asked.client._connection
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    collector = Collector(1, lambda: done.set_result(None), lambda units: None)
    request, _ = generate_request(asked.prompt, asked.same())
    now_ns = monotonic_ns()
    pending = Pending(
        now_ns, "generate", encoded(request, FRAME_BYTES_MAX), collector, model=asked.model, worker="", priority=0,
        resume="exact", window=WINDOW_UNITS, accepted_ns=now_ns,
    )  # fmt: skip
    pending.next, pending.characters, pending.token_ids = tokens, characters, whole.token_ids[:tokens]
    connection.session.requests[pending.number] = pending
    connection.session._submit(pending, now_ns)
    connection._schedule_flush()
    await done
    return collector.completion("", asked.model)


async def _operations_are_refused_or_done(asked: Asked) -> None:
    can = set(asked.status.capabilities)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "generate": lambda: asked.answer(max_new_tokens=1),
        "embed": lambda: asked.client.embed(asked.model, ["one"]),
        "count_tokens": lambda: asked.client.count_tokens(asked.model, "one"),
        "tokenize": lambda: asked.client.tokenize(asked.model, "one"),
        "detokenize": lambda: asked.client.detokenize(asked.model, [1]),
        "score": lambda: asked.client.score(asked.model, "one", ["two"]),
        "classify": lambda: asked.client.classify(asked.model, ["one"]),
        "embed_tokens": lambda: asked.client.embed_tokens(asked.model, ["one"]),
        "reward": lambda: asked.client.reward(asked.model, ["one"]),
    }
    for operation, call in calls.items():
        try:
            await call()
        except UnsupportedOperationError:
            expect(operation not in can, f"{operation} is announced, and refused")
        else:
            expect(operation in can, f"{operation} is not announced, and was done")


async def _a_chat_is_answered(asked: Asked) -> None:
    content = "Say something."
    as_text = await asked.client.chat(asked.model, [{"role": "user", "content": content}], **asked.same())
    parts = [{"type": "text", "text": content}]
    as_parts = await asked.client.chat(asked.model, [{"role": "user", "content": parts}], **asked.same())
    expect(as_text.choices[0].finish_reason, "the answer has no end")
    if asked.takes("temperature"):
        expect(as_text.text == as_parts.text, f"content as a text gave {as_text.text!r}, as parts {as_parts.text!r}")


async def _vectors_are_rows(asked: Asked) -> None:
    texts = ["one text", "another text", "one text"]
    rows = (await asked.client.embed(asked.model, texts)).tolist()
    expect(len(rows) == len(texts), f"{len(texts)} texts gave {len(rows)} vectors")
    lengths = {len(row) for row in rows}
    expect(len(lengths) == 1, f"the vectors have {sorted(lengths)} dimensions")
    wanted = asked.status.dimensions
    expect(not wanted or lengths == {wanted}, f"a vector has {lengths.pop()} dimensions, {wanted} are announced")
    expect(all(math.isfinite(value) for row in rows for value in row), "a vector holds what is no number")
    same = all(
        math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5) for one, other in zip(rows[0], rows[2], strict=True)
    )
    expect(same, "the same text has two vectors")


async def _tokens_are_counted(asked: Asked) -> None:
    tokens = await asked.client.tokenize(asked.model, asked.prompt)
    counted = await asked.client.count_tokens(asked.model, asked.prompt)
    expect(len(tokens) == counted, f"tokenize gave {len(tokens)} tokens, count_tokens says {counted}")


async def _scores_are_numbers(asked: Asked) -> None:
    scores = await asked.client.score(asked.model, "a query", ["a document", "another", "a third"])
    expect(len(scores) == 3, f"3 documents have {len(scores)} scores")
    expect(all(math.isfinite(score) for score in scores), f"the scores are {scores}")


async def _tokens_have_vectors(asked: Asked) -> None:
    short, long = await asked.client.embed_tokens(asked.model, ["one text", "another text, which is longer"])
    expect(len(short) < len(long), f"a text has {len(short)} vectors, and a longer one {len(long)}")
    expect(short.shape[1] == long.shape[1], f"vectors have {short.shape[1]} and {long.shape[1]} dimensions")
    expect(all(map(math.isfinite, short.ravel().tolist())), "a vector holds what is no number")


def _rows_are_numbers(operation: str) -> Callable[[Asked], Awaitable[None]]:
    async def kept(asked: Asked) -> None:
        rows = await getattr(asked.client, operation)(asked.model, ["one text", "another"])
        expect(all(row and all(map(math.isfinite, row)) for row in rows), f"these are no numbers: {rows}")

    return kept


async def _it_is_as_it_was(asked: Asked) -> None:
    for worker in await asked.client.workers():
        if asked.model in worker.models:
            expect(worker.in_flight == 0, f"{worker.in_flight} requests still hold slots of {worker.name}")
            expect(worker.state == "ready", f"worker {worker.name} is {worker.state}")


_TEXT: Final = "generate"
#: In the order in which they are asked.
ALL: Final[tuple[Promise, ...]] = (
    Promise("The pieces of an answer are the whole of it, and it has one end.", _pieces_are_the_whole, _TEXT),
    Promise("An answer is no longer than max_new_tokens.", _length_is_kept, _TEXT),
    Promise("The usage counts the prompt and the answer.", _usage_is_told, _TEXT),
    Promise("At temperature 0 the same prompt has the same answer.", _greedy_is_the_same, _TEXT, ("temperature",)),
    Promise("What others ask at the same time changes nothing.", _neighbours_change_nothing, _TEXT, ("temperature",)),
    Promise("The same seed draws the same answer.", _a_seed_is_an_answer, _TEXT, ("seed",)),
    Promise("A stop string ends the answer and is no part of it.", _stop_strings_end, _TEXT, ("stop", "temperature")),
    Promise("All of n choices come to an end.", _all_choices_end, _TEXT, ("n",)),
    Promise("With echo the answer begins with the prompt.", _echo_begins_with_the_prompt, _TEXT, ("echo",)),
    Promise("A parameter that is not honoured is refused by name.", _parameters_are_refused_by_name, _TEXT),
    Promise("A key of extra that is not announced is refused by name.", _unknown_keys_are_refused_by_name, _TEXT),
    Promise("Odd prompts have an answer or an error of their own.", _odd_prompts_have_an_answer_or_an_error, _TEXT),
    Promise("A prompt that the context cannot hold is refused with both numbers.", _too_long_is_told, _TEXT),
    Promise("A request that is cancelled leaves its slot to the next.", _a_cancel_frees_the_slot, _TEXT),
    Promise("A deadline ends a request, and nothing else.", _a_deadline_ends, _TEXT),
    Promise(
        "An answer goes on where another worker broke off.", _resumes_where_it_broke_off, "resume", ("temperature",)
    ),
    Promise("A chat is answered, whether its content is a text or parts.", _a_chat_is_answered, "chat"),
    Promise("Each text has a vector of the announced length.", _vectors_are_rows, "embed"),
    Promise("A prompt has as many tokens as are counted.", _tokens_are_counted, "tokenize"),
    Promise("Each document has a score.", _scores_are_numbers, "score"),
    Promise("Each text has a probability of each class.", _rows_are_numbers("classify"), "classify"),
    Promise("Each token of a text has a vector.", _tokens_have_vectors, "embed_tokens"),
    Promise("Each text has a reward.", _rows_are_numbers("reward"), "reward"),
    Promise(
        "An operation that is not announced is refused, and one that is, is done.", _operations_are_refused_or_done
    ),
    Promise("When all is over nothing holds a slot.", _it_is_as_it_was),
)
