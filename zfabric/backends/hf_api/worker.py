"""HuggingfaceApiWorker: many remote models in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zfabric.backends.front.bounds import check_messages, context_overflow, what_may_fit
from zfabric.backends.front.continuation import continues
from zfabric.backends.hf_api import tei
from zfabric.backends.hf_api.answers import AnswerReader
from zfabric.backends.hf_api.channel import CLOSE_WAIT_S, USAGE_WAIT_S, AttemptError, Channel
from zfabric.backends.hf_api.embeddings import embed
from zfabric.backends.hf_api.models_file import Upstream, read_models_file
from zfabric.backends.hf_api.requests import as_chat, body_of, options_for, parameters_of, path_of, tells_tokens
from zfabric.backends.hf_api.tokens import Tokenizer
from zfabric.errors import (
    ConfigurationError,
    RateLimitedError,
    UnavailableError,
    UnknownModelError,
    UnsupportedOperationError,
)
from zfabric.wire.chat import Message
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, GenerateRequest, Usage
from zfabric.wire.sampling import ALL_PARAMETERS
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)
from zfabric.worker.base import BaseModelWorker, EngineLoad

#: Characters that are turned into tokens on the event loop: a fraction of a millisecond, as long as a change of threads.
_INLINE_CHARACTERS: Final = 2_000


@dataclass(frozen=True, kw_only=True)
class HuggingfaceApiOptions:
    """Options of the hf-api backend.

    Attributes:
        models: The models file, TOML or JSON. SIGHUP reads it anew.
    """

    models: Path


class HuggingfaceApiWorker(BaseModelWorker):
    """Serves what a models file lists, each from a server that speaks one of the protocols of the Hugging Face API."""

    # Each model announces those that its server honours.
    parameters = ALL_PARAMETERS
    # Whatever a server may know; see `body_of` for what is the worker's own to say.
    extra = None
    Options = HuggingfaceApiOptions

    def __init__(self, options: HuggingfaceApiOptions) -> None:
        self.options = options
        self._channels: dict[str, Channel] = {}
        self._by_name: dict[str, Channel] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._reports = 0
        self._loaded = False

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def load(self) -> list[ModelInfo]:
        self._use(await self._read())
        self._loaded = True
        return self._infos()

    async def reload(self) -> None:
        """Read the models file anew. What runs goes on over the connections that it has.

        Raises:
            ConfigurationError: The file is wrong, or names what another backend of this worker serves; all stays as it was.
        """
        channels = await self._read()
        try:
            self.steps.models_changed(self._infos(channels))
        except ConfigurationError:
            await asyncio.gather(*(c.close() for c in channels if self._channels.get(c.upstream.name) is not c))
            raise
        self._use(channels)

    async def _read(self) -> list[Channel]:
        """The channels that the models file wants: those that there are, where their entry is unchanged, and new ones."""
        upstreams = await asyncio.to_thread(read_models_file, self.options.models)
        tokenizers = dict(self._tokenizers)
        for upstream in upstreams:
            if upstream.tokenizer and upstream.tokenizer not in tokenizers:
                loaded = await asyncio.to_thread(Tokenizer, upstream.tokenizer, upstream.name)
                tokenizers[upstream.tokenizer] = loaded
        # Nothing of the file can be wrong from here on.
        self._tokenizers = tokenizers
        kept = {name: channel for name, channel in self._channels.items() if channel.configured in upstreams}
        return [kept.get(upstream.name) or Channel(upstream, self._announce) for upstream in upstreams]

    def _use(self, channels: Sequence[Channel]) -> None:
        old, self._channels = self._channels, {channel.upstream.name: channel for channel in channels}
        self._by_name = {name: c for c in channels for name in (c.upstream.name, *c.upstream.aliases)}
        for name, channel in old.items():
            if self._channels.get(name) is not channel:
                channel.retire()
        self.slots = sum(channel.upstream.slots for channel in channels)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    def load_report(self) -> EngineLoad:
        # Every wait here has a limit of its own, so a slow upstream must not look like a worker that has hung.
        self._reports += 1
        out = sum(not channel.breaker.dispatchable for channel in self._channels.values())
        return EngineLoad(progress=self._reports, slots=self.slots, gauges={"upstreams_out": float(out)})

    def _announce(self) -> None:
        """An upstream was taken out, or came back. What cannot be announced is in the log, and is tried again with the
        next change."""
        if self._loaded:
            with contextlib.suppress(ConfigurationError):
                self.steps.models_changed(self._infos())

    def _infos(self, channels: Sequence[Channel] | None = None) -> list[ModelInfo]:
        """What is served now, or would be by these: upstreams that are taken out are left out."""
        present = self._channels.values() if channels is None else channels
        return [self._info(channel.upstream) for channel in present if channel.breaker.dispatchable]

    def _info(self, upstream: Upstream) -> ModelInfo:
        tokenizer = self._tokenizer(upstream)
        templated = upstream.protocol == "completions" and tokenizer is not None and tokenizer.has_template
        if upstream.protocol == "tei":
            capabilities = list(tei.CAPABILITIES[upstream.task])
        elif not upstream.generates:
            capabilities = ["embed"]
        else:
            capabilities = ["generate"]
            capabilities += ["chat"] * (upstream.protocol == "chat" or templated)
            capabilities += ["resume"] * tells_tokens(upstream)
            capabilities += ["multimodal"] * upstream.multimodal
        capabilities += (
            ["count_tokens", "tokenize", "detokenize"] if tokenizer is not None or upstream.protocol == "tei" else []
        )
        return ModelInfo(
            name=upstream.name,
            aliases=list(upstream.aliases),
            context_length=upstream.context_length,
            capabilities=capabilities,
            parameters=sorted({*parameters_of(upstream), *options_for(upstream, templated=templated)}),
            dimensions=upstream.dimensions,
            slots=upstream.slots,
            details={"engine": "hf-api", "protocol": upstream.protocol, "server": upstream.server},
        )

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Deltas as the upstream sends them. Cancelled, it closes the connection at once."""
        channel = self._channel(request.model)
        upstream = channel.upstream
        if not upstream.generates:
            raise _cannot(upstream, "generate")
        goes_on = self._goes_on(upstream, request)
        prompt = await self._prompt(upstream, request, goes_on=goes_on)
        body, path = body_of(upstream, request, prompt, goes_on=goes_on), path_of(upstream)
        attempt = 0
        channel.check()
        with channel:
            while True:
                reader = AnswerReader(upstream, request, self._tokenizer(upstream), goes_on=goes_on)
                started = False
                if reader.ended:
                    break
                try:
                    async with aclosing(_deltas(channel, path, body, reader)) as deltas:  # type: ignore[type-var]
                        async for delta in deltas:
                            started = True
                            yield delta
                    break
                except AttemptError as failure:
                    if started or not channel.breaker.dispatchable:
                        raise failure.error from None
                    if channel.learn(failure.error):
                        upstream = channel.upstream
                        body = body_of(upstream, request, prompt, goes_on=goes_on)
                        continue
                    await channel.pause(attempt, failure)
                    attempt += 1
        usage = await self._usage(upstream, request, reader, len(request.resume_token_ids) if goes_on else 0)
        for delta in reader.finish(usage):
            yield delta

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        with self._asked(request.model, "embed") as channel:
            return await embed(channel, request)

    async def embed_tokens(self, request: EmbedTokensRequest) -> EmbedTokensResult:
        with self._asked(request.model, "embed_tokens") as channel:
            return await tei.embed_tokens(channel, request)

    async def score(self, request: ScoreRequest) -> list[float]:
        with self._asked(request.model, "score") as channel:
            return await tei.score(channel, request)

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        with self._asked(request.model, "classify") as channel:
            return await tei.classify(channel, request)

    async def reward(self, request: RewardRequest) -> list[list[float]]:
        with self._asked(request.model, "reward") as channel:
            return await tei.reward(channel, request)

    def _asked(self, model: str, operation: str) -> Channel:
        """A model's channel. Raises: UnsupportedOperationError: Its server does not do this."""
        channel = self._channel(model)
        if operation not in self._info(channel.upstream).capabilities:
            raise _cannot(channel.upstream, operation)
        channel.check()
        return channel

    async def count_tokens(self, request: CountRequest) -> int:
        return len(await self.tokenize(request))

    async def tokenize(self, request: CountRequest) -> list[int]:
        if self._by_server(request.model):
            if request.prompt is None:
                raise UnsupportedOperationError("this server tokenizes texts, not chats", operation="tokenize")
            with self._asked(request.model, "tokenize") as channel:
                return await tei.tokenize(channel, request.prompt)
        upstream, tokenizer = self._named_tokenizer(request.model, "tokenize")
        return await asyncio.to_thread(tokenizer.prompt, *_messages_of(upstream, request), request.tools, request.chat)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        if self._by_server(request.model):
            with self._asked(request.model, "detokenize") as channel:
                return await tei.detokenize(channel, request)
        _, tokenizer = self._named_tokenizer(request.model, "detokenize")
        skip = request.skip_special_tokens
        return await asyncio.to_thread(tokenizer.text, request.token_ids, skip_special_tokens=skip)

    def _by_server(self, model: str) -> bool:
        """Whether a model's server makes tokens: where the models file names no tokenizer, and the server can."""
        upstream = self._channel(model).upstream
        return upstream.protocol == "tei" and upstream.tokenizer is None

    def _named_tokenizer(self, model: str, operation: str) -> tuple[Upstream, Tokenizer]:
        """A model's tokenizer. Raises: UnsupportedOperationError: The models file names none."""
        upstream = self._channel(model).upstream
        tokenizer = self._tokenizer(upstream)
        if tokenizer is None:
            raise UnsupportedOperationError(
                f"model {upstream.name!r} cannot {operation}: the models file names no tokenizer for it",
                operation=operation,
                model=upstream.name,
            )
        return upstream, tokenizer

    def _channel(self, model: str) -> Channel:
        channel = self._by_name.get(model) if model else next(iter(self._channels.values()), None)
        if channel is None:
            raise UnknownModelError(f"the models file has no {model!r}", model=model)
        return channel

    def _tokenizer(self, upstream: Upstream) -> Tokenizer | None:
        return self._tokenizers[upstream.tokenizer] if upstream.tokenizer else None

    def _takes_tokens(self, upstream: Upstream) -> bool:
        """Whether prompts go out as tokens, so that an answer can go on exactly where another worker stopped."""
        return upstream.protocol == "completions" and upstream.server == "vllm" and upstream.tokenizer is not None

    def _goes_on(self, upstream: Upstream, request: GenerateRequest) -> bool:
        """Whether the server goes on after the tokens that the reader has; else it draws them again, if there are any.

        Raises:
            UnsupportedOperationError: The answer was begun elsewhere, and this API tells no tokens to go on by.
        """
        if not request.resume_token_ids:
            return False
        if not tells_tokens(upstream) or request.sampling.n > 1:
            raise UnsupportedOperationError(
                f"model {upstream.name!r} cannot go on with an answer that was begun elsewhere",
                operation="resume",
                model=upstream.name,
            )
        return self._takes_tokens(upstream) and continues(request)

    async def _prompt(self, upstream: Upstream, request: GenerateRequest, *, goes_on: bool) -> list[int] | None:
        """The prompt as tokens, where the protocol takes those and there is need of them.

        Raises:
            ContextOverflowError: It is known here already to be too long.
        """
        if upstream.protocol != "completions":
            return None
        ids, length = request.prompt_token_ids, upstream.context_length
        tokenizer = self._tokenizer(upstream)
        if tokenizer is not None and length:
            what_may_fit(request.prompt or "", tokenizer.longest, length, truncate=False)
            check_messages(request.messages or (), tokenizer.longest, length)
        if ids is None and tokenizer is not None and (request.messages is not None or self._takes_tokens(upstream)):
            if request.prompt is not None and len(request.prompt) <= _INLINE_CHARACTERS:
                ids = tokenizer.prompt(request.prompt, None)
            else:
                ids = await asyncio.to_thread(
                    tokenizer.prompt, request.prompt, request.messages, request.tools, request.chat
                )
        if ids is not None and 0 < length <= len(ids):
            raise context_overflow(len(ids), length)
        return [*ids, *request.resume_token_ids] if goes_on and ids is not None else ids

    async def _usage(self, upstream: Upstream, request: GenerateRequest, reader: AnswerReader, before: int) -> Usage:
        """As the server counted, else with the tokenizer, else by what came; all but the first marked as estimated.

        Args:
            before: Tokens of the answer that to the server were prompt.
        """
        told = reader.usage
        if told is not None:
            return Usage(told.prompt_tokens - before, told.completion_tokens + before, told.cached_tokens)
        tokenizer = self._tokenizer(upstream)
        prompt = len(request.prompt_token_ids or ())
        if tokenizer is None:
            return Usage(prompt, reader.tokens + before, estimated=True)

        def count() -> Usage:
            asked = prompt or len(tokenizer.prompt(*_messages_of(upstream, request), request.tools))
            return Usage(asked, tokenizer.count_text(reader.text) + before, estimated=True)

        return await asyncio.to_thread(count)


def _cannot(upstream: Upstream, operation: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"model {upstream.name!r} does not {operation}, its server speaks {upstream.protocol}", operation=operation
    )


def _messages_of(
    upstream: Upstream, request: GenerateRequest | CountRequest
) -> tuple[str | None, list[Message] | None]:
    """Prompt and messages as the server sees them: where only chats are spoken, a prompt goes as one message."""
    if upstream.protocol == "chat" and request.prompt is not None:
        return None, as_chat(request.prompt)
    return request.prompt, request.messages


async def _deltas(channel: Channel, path: str, body: dict[str, Any], reader: AnswerReader) -> AsyncIterator[Delta]:
    """One try at an answer, up to its end.

    Raises:
        AttemptError: It did not come to its end.
    """
    usage_comes = channel.upstream.protocol != "tgi"

    def patience_s() -> float | None:
        if not reader.ended:
            return None
        return USAGE_WAIT_S if usage_comes and reader.usage is None else CLOSE_WAIT_S

    async with aclosing(channel.events(path, body, patience_s)) as events:  # type: ignore[type-var]
        async for data in events:
            if data == b"[DONE]":
                usage_comes = False
                continue
            try:
                told = reader.take(data)
            except (RateLimitedError, UnavailableError) as error:
                raise AttemptError(error, transient=True) from None
            for delta in told:
                yield delta
            if reader.stopped_here:
                # The server would go on; closing the connection ends that.
                return
    if not reader.ended:
        raise channel.cut()
