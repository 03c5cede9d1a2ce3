"""From a request's prompt to an engine's input."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from zfabric.backends.front.bounds import (
    check_logprobs,
    check_messages,
    check_pair,
    check_prompt_logprobs,
    context_overflow,
    fit,
    known_tokens,
    longest_token,
    what_may_fit,
)
from zfabric.backends.front.chat import no_template, template_of
from zfabric.backends.front.embed_inputs import EmbedInputs, Piece, with_special_tokens
from zfabric.backends.front.images import has_images, open_images
from zfabric.backends.front.media import refuse_addresses, with_addresses
from zfabric.backends.front.sentence_files import SentenceFiles, read
from zfabric.backends.vllm_engine.compat.pooling import render_pair
from zfabric.backends.vllm_engine.compat.rendering import chat_template, render_chat, render_text, tokens_input
from zfabric.errors import RequestError
from zfabric.wire.chat import PLAIN, WHOLE, ChatOptions, Message
from zfabric.wire.payloads import CountRequest, GenerateRequest
from zfabric.wire.tasks import EmbedRequest, EmbedTokensRequest

#: Characters that are turned into tokens on the event loop: a fraction of a millisecond, as long as a change of threads.
_INLINE_CHARACTERS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that the engine can take.

    Attributes:
        token_ids: All of its tokens.
        input: vLLM's input: those tokens, and images where there are any.
        whole: Nothing was cut off.
    """

    token_ids: list[int]
    input: Any
    whole: bool = True

    @property
    def plain(self) -> bool:
        """Whether it is tokens and nothing else."""
        return str(self.input["type"]) == "token"


class Prompts:
    """Prepares prompts.

    Args:
        engine: An `AsyncLLM`.
        context_length: Tokens of prompt and answer.
        template: Text of a chat template instead of the model's own.

    Attributes:
        sentences: What the files beside the model say of its texts.
    """

    def __init__(self, engine: Any, context_length: int, template: str | None) -> None:
        self._engine = engine
        self._context_length = context_length
        self._template = chat_template(engine, template)
        templates = getattr(engine.renderer.get_tokenizer(), "chat_template", None)
        self._several = template is None and isinstance(templates, dict)
        self._vocabulary_size = int(engine.vllm_config.model_config.get_vocab_size())
        files = sentence_files(engine)
        encode = with_special_tokens(engine.renderer.get_tokenizer(), lower_case=files.lower_case)
        self._longest = longest_token(engine.renderer.get_tokenizer())
        self._domains = frozenset(engine.vllm_config.model_config.allowed_media_domains or ())
        bounds: dict[str, Any] = {
            "context_length": context_length,
            "vocabulary_size": self._vocabulary_size,
            "longest": self._longest,
        }
        self.sentences = files
        self._embedded = EmbedInputs(encode, prompts=files.prompts, prompt_name=files.prompt_name, **bounds)
        self._classified = EmbedInputs(encode, **bounds)
        most = int(engine.vllm_config.model_config.max_logprobs)
        # What vLLM calls -1 is the whole vocabulary.
        self._logprobs_max = self._vocabulary_size if most < 0 else most

    @property
    def chat(self) -> bool:
        """Whether messages are understood."""
        return self._template is not None or self._several

    async def of(self, request: GenerateRequest) -> Prompt:
        """The prompt of a request for text.

        Raises:
            ContextOverflowError: It leaves no room for an answer, and may not be cut.
            UnsupportedOperationError: Messages, and no chat template.
            RequestError: A token that is not in the vocabulary, messages that the template refuses, or nothing at all.
            ParameterRangeError: More log-probabilities than are given, or than go out in one piece.
        """
        check_logprobs(request.sampling, self._logprobs_max)
        prompt = await self._of(request)
        check_prompt_logprobs(request.sampling.prompt_logprobs, len(prompt.token_ids))
        return prompt

    async def _of(self, request: GenerateRequest) -> Prompt:
        truncate = request.sampling.truncate_prompt
        if request.prompt_token_ids is not None:
            given = what_may_fit(request.prompt_token_ids, 1, self._context_length, truncate=truncate)
            found = Prompt(self.checked(given), None, whole=given is request.prompt_token_ids)
        elif request.messages is not None:
            if not truncate:
                check_messages(request.messages, self._longest, self._context_length)
            found = await self._chat(request.messages, request.tools, request.chat)
        else:
            text = request.prompt or ""
            kept = what_may_fit(text, self._longest, self._context_length, truncate=truncate)
            tokens = self.checked(await self.tokens(kept))
            found = Prompt(tokens, None, whole=kept is text)
        tokens, length = found.token_ids, self._context_length
        if not tokens:
            raise RequestError("the prompt has no tokens")
        may_cut = truncate and (found.input is None or found.plain)
        fitting = fit(tokens, length, truncate=may_cut)
        if fitting is tokens and found.input:
            return found
        return Prompt(fitting, tokens_input(fitting), whole=found.whole and fitting is tokens)

    async def of_count(self, request: CountRequest) -> list[int]:
        """Tokens of a prompt, of any length. Raises: see `of`."""
        if request.messages is not None:
            return (await self._chat(request.messages, request.tools, request.chat)).token_ids
        return await self.tokens(request.prompt or "")

    def checked(self, token_ids: Sequence[int]) -> list[int]:
        """Tokens that the model has. Raises: RequestError: It has not got one of them."""
        return known_tokens(token_ids, self._vocabulary_size)

    async def pieces(self, request: EmbedRequest | EmbedTokensRequest, *, prompted: bool = True) -> list[Piece]:
        """Tokens of the inputs of an embedding, in pieces that fit the context.

        Args:
            prompted: Put what the model wants before each text.

        Raises:
            FabricError: See `EmbedInputs.pieces`.
        """
        return await asyncio.to_thread((self._embedded if prompted else self._classified).pieces, request)

    async def tokens(self, text: str) -> list[int]:
        """Tokens of a text, special ones included."""
        return await render_text(self._engine, text, inline=len(text) <= _INLINE_CHARACTERS)

    async def pair(self, query: str, document: str) -> tuple[list[int], int | None]:
        """Tokens of two texts to compare, and where the second begins, for models that want to know.

        Raises:
            ContextOverflowError: They do not fit.
        """
        check_pair(query, document, self._longest, self._context_length)
        tokens, segments = await asyncio.to_thread(render_pair, self._engine, query, document)
        if len(tokens) > self._context_length:
            raise context_overflow(len(tokens), self._context_length)
        return tokens, segments

    async def judged(self, given: str | list[Message]) -> list[int]:
        """Tokens of a text or a chat that a reward model reads.

        Raises:
            UnsupportedOperationError: Messages, and no chat template.
            ContextOverflowError: They do not fit.
        """
        if isinstance(given, str):
            tokens = await self.tokens(given)
        else:
            tokens = (await self._chat(given, None, WHOLE)).token_ids
        if len(tokens) > self._context_length:
            raise context_overflow(len(tokens), self._context_length)
        return tokens

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""
        tokenizer = self._engine.renderer.get_tokenizer()
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    async def _chat(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, chat: ChatOptions | None
    ) -> Prompt:
        template = self._template_for(tools, chat)
        refuse_addresses(messages, self._domains)
        if has_images(messages):
            await asyncio.to_thread(open_images, messages, addresses=True)
        arguments = (chat or PLAIN).arguments
        if tools:
            arguments["tools"] = tools
        try:
            given = with_addresses(messages)
            rendered = await render_chat(self._engine, given, template, arguments)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            # The last is what vLLM raises for files that it may not read.
            raise RequestError(f"these messages are refused: {error}") from None
        return Prompt(list(rendered["prompt_token_ids"]), rendered)

    def _template_for(self, tools: list[dict[str, Any]] | None, chat: ChatOptions | None) -> str:
        """The text of the template that is for such a request. Raises: UnsupportedOperationError: There is none."""
        if self._several and (tools or self._template is None or (chat is not None and chat.documents is not None)):
            # vLLM chooses only where it is given no template; its choice knows nothing of documents.
            return template_of(self._engine.renderer.get_tokenizer(), tools, chat)
        if self._template is None:
            raise no_template()
        return self._template


def sentence_files(engine: Any) -> SentenceFiles:
    """What the files beside a pooling model say of its texts. Its poolings and steps are vLLM's to read."""
    settings = engine.vllm_config.model_config
    if settings.runner_type != "pooling":
        return SentenceFiles()
    try:
        return read(str(settings.model), {"revision": settings.revision})
    except OSError:
        # vLLM has found the model without them.
        return SentenceFiles()
