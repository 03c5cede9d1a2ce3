"""From a request to sequences that can be computed: tokens, bounds, seeds, and refusals of what cannot be honoured."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from zfabric.backends.front.adapters import Adapters
from zfabric.backends.front.bounds import check_logprobs, check_prompt_logprobs, fit, image_parts, known_tokens
from zfabric.backends.front.generation_config import GenerationDefaults
from zfabric.backends.front.images import has_images, key_of, see
from zfabric.backends.front.parsing import AnswerFormat, MarkTokens, force_calls
from zfabric.backends.front.prompts import PromptTokens
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.request.structured_outputs import GUIDED, StructuredOutputs
from zfabric.backends.hf_transformers.scheduling.hearing import Hearing
from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.limits import LOGPROBS_MAX
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

#: Between the seeds of two choices of one request; any odd number of many bits will do.
_SEED_STRIDE = 0x9E3779B97F4A7C15

#: The key of a token that begins an answer.
_FIRST: Final = "forced_bos_token_id"
#: Beams are compared as wholes and change places, so they are not drawn, told token by token, or guided.
_NOT_BY_BEAMS: Final = GUIDED | {"top_p", "top_k", "min_p", "typical_p", "logprobs", "prompt_logprobs"}


class InputProcessor:
    """Prepares requests; it computes nothing, and runs beside the engine's thread.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Makes tokens of prompts with it.
        vocabulary_size: Of the model's logits.
        context_length: Tokens of prompt and answer.
        end_tokens: Tokens that end an answer.
        seed: For requests without one; None draws.
        start_token: What a decoder begins with whose encoder reads the prompt; None if there is no encoder.
        adapters: Those that requests can name.
        processor: A transformers processor, for models that see images.
        hearing: Prepares sounds, for models that hear.
        logprobs_max: Alternatives per token that a request may ask the log-probabilities of.
        defaults: What the model itself says of its answers.
        answer_format: How the model writes reasoning and calls; None if it writes none.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: PromptTokens,
        *,
        vocabulary_size: int,
        context_length: int,
        end_tokens: frozenset[int],
        seed: int | None,
        start_token: int | None = None,
        adapters: Adapters[Adapter] | None = None,
        processor: Any = None,
        hearing: Hearing | None = None,
        logprobs_max: int = LOGPROBS_MAX,
        defaults: GenerationDefaults | None = None,
        answer_format: AnswerFormat | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._logprobs_max = logprobs_max
        self._vocabulary_size = vocabulary_size
        self._context_length = context_length
        self._end_tokens = frozenset(token for token in end_tokens if 0 <= token < vocabulary_size)
        self._seed = seed
        self._start_token = start_token
        self._processor = processor
        self._hearing = hearing
        self._adapters = adapters or Adapters()
        self._defaults = defaults or GenerationDefaults()
        self._format = answer_format or AnswerFormat("")
        self._marks = MarkTokens(self._format, tokenizer)
        self._suppressed, self._suppressed_first = (
            frozenset(token for token in tokens if 0 <= token < vocabulary_size)
            for tokens in (self._defaults.suppressed, self._defaults.suppressed_first)
        )
        self._bad_words = tuple(
            words for words in self._defaults.bad_words if min(words) >= 0 and max(words) < vocabulary_size
        )
        self._guides = StructuredOutputs(tokenizer, vocabulary_size=vocabulary_size, end_tokens=self._end_tokens)

    def run_by(self, run: Callable[[Callable[[], Any]], Future[Any]]) -> None:
        """How a job is run with the model, by whoever has it."""
        if self._hearing is not None:
            self._hearing.run = run

    def sequences(self, answer: Answer) -> list[Sequence]:
        """The choices of a request, nothing computed yet; `answer.prompt` is set.

        Raises:
            FabricError: The request cannot be served: see `prompt_tokens`, `fit`; or a parameter is out of range.
        """
        request = answer.request
        force_calls(request)
        sampling = request.sampling
        self._check(request)
        known_tokens(request.resume_token_ids, self._vocabulary_size)
        tokens = self._tokens(answer)
        kept = self._place(answer, tokens)
        check_prompt_logprobs(sampling.prompt_logprobs, len(answer.prompt))
        sampling = request.sampling = self._defaults.lengths(sampling, self._counted(answer))
        room = self._context_length - len(answer.prompt)
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._end_tokens)
        seed = sampling.seed if sampling.seed is not None else self._seed
        base = secrets.randbits(63) if seed is None else seed
        echo = self._echo(request, kept, len(tokens))
        banned = self._banned(sampling)
        if sampling.use_beam_search:
            _check_beams(request)
        guides = [self._guides.make(request) for _ in range(answer.choices)]
        if guides[0] is not None:
            # What is whole ends, also for those who ignore the model's own end.
            ends |= self._guides.end_tokens
        tail = partial(self._tail, kept)
        readers = [self._format.reader(request, tail, index=index, lead=echo or "") for index in range(answer.choices)]
        limit = min(sampling.max_new_tokens or room, room)
        forced = self._forced(request, limit)
        return [
            Sequence(
                answer,
                index=index,
                limit=limit,
                seed=base + index * _SEED_STRIDE,
                end_tokens=ends,
                bad_words=banned,
                suppressed=(self._suppressed, self._suppressed_first),
                tokenizer=self._tokenizer,
                echo=echo,
                guide=guide,
                reader=reader,
                marks=self._marks.of(reader),
                forced=forced,
            )
            for index, (guide, reader) in enumerate(zip(guides, readers, strict=True))
        ]

    def _counted(self, answer: Answer) -> int:
        """Tokens that bounds of a whole text count beside the answer: Whisper's leave out those that its answers begin with."""
        return 0 if self._hearing is not None else len(answer.prompt)

    def _forced(self, request: GenerateRequest, limit: int) -> dict[int, frozenset[int]]:
        """Tokens that come at places of an answer of so many tokens at most, as `generate` has it."""
        places = {limit - 1: self._defaults.forced_last}
        if self._start_token is not None and limit > 1:
            chosen = request.extra.get(_FIRST)
            places[0] = self._defaults.forced_first if chosen is None else frozenset([chosen])
        known = {place: frozenset(t for t in tokens if t < self._vocabulary_size) for place, tokens in places.items()}
        return {place: tokens for place, tokens in known.items() if tokens}

    def _tail(self, tokens: list[int], count: int) -> str:
        """The text of the last tokens of a prompt, special ones included."""
        return str(self._tokenizer.decode(tokens[-count:], skip_special_tokens=False))

    def _tokens(self, answer: Answer) -> list[int]:
        """Tokens of the prompt; `answer.media` and what belongs to it is set if it has images."""
        request = answer.request
        if self._hearing is not None:
            return known_tokens(self._hearing.prepare(answer), self._vocabulary_size)
        if has_images(request.messages):
            tokens, answer.media = see(
                self._processor, self._tokenizer, request.messages or (), request.tools, request.chat
            )
            answer.pictures, answer.media_key = len(image_parts(request.messages or ())), key_of(answer.media)
            return known_tokens(tokens, self._vocabulary_size)
        return self._prompts.make(
            request.prompt, request.messages, request.prompt_token_ids, request.tools, request.chat,
            truncate=request.sampling.truncate_prompt,
        )  # fmt: skip

    def _place(self, answer: Answer, tokens: list[int]) -> list[int]:
        """Where the prompt goes: before the answer, or into the encoder. Returns what is kept of it.

        Raises:
            ContextOverflowError: It is too long.
        """
        answer.adapter = self._adapters.find(answer.request.model)
        truncate = answer.request.sampling.truncate_prompt
        if self._start_token is None:
            # Without its placeholders an image cannot be seen, so such a prompt is not cut.
            truncate = truncate and answer.media is None
            answer.prompt = fit(tokens, self._context_length, truncate=truncate)
            return answer.prompt
        if self._hearing is not None:
            answer.source = [0] * self._hearing.columns
            answer.prompt = fit(tokens, self._context_length, truncate=False)
            return answer.prompt
        # The answer takes nothing of the encoder's context.
        answer.source = fit(tokens, self._context_length + 1, truncate=truncate)
        answer.prompt = [self._start_token]
        return answer.source

    def _echo(self, request: GenerateRequest, kept: list[int], count: int) -> str | None:
        """What stands before the answer: what was kept of a prompt of so many tokens; None if nothing is wanted there."""
        if not request.sampling.echo:
            return None
        if request.prompt is not None and len(kept) == count:
            return request.prompt
        return str(self._tokenizer.decode(kept, skip_special_tokens=request.sampling.skip_special_tokens))

    def _banned(self, sampling: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Tokens of each bad word, as it begins a text and as it follows a space."""
        forms = [form for word in sampling.bad_words for form in (word, f" {word}")]
        return tuple(dict.fromkeys([*self._bad_words, *(words for form in forms if (words := self._words(form)))]))

    def _words(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check(self, request: GenerateRequest) -> None:
        """What only someone who knows the vocabulary can check.

        Raises:
            ParameterRangeError: A token that the model does not have.
            RequestError: Stop strings are to end a text that is not made.
        """
        sampling = request.sampling
        check_logprobs(sampling, self._logprobs_max)
        if sampling.stop and request.extra.get("detokenize") is False:
            raise RequestError("stop is given beside detokenize=False, which makes no text", parameter="stop")
        named: dict[str, Iterable[int]] = {
            "stop_token_ids": sampling.stop_token_ids,
            "logit_bias": sampling.logit_bias or (),
            "allowed_token_ids": request.extra.get("allowed_token_ids", ()),
            _FIRST: [request.extra[_FIRST]] if _FIRST in request.extra else (),
        }
        if _FIRST in request.extra and self._start_token is None:
            raise RequestError(f"{_FIRST} is for models with an encoder, this one has none", parameter=_FIRST)
        for name, tokens in named.items():
            for token in tokens:
                if not 0 <= token < self._vocabulary_size:
                    raise ParameterRangeError(
                        f"{name} holds token {token}, it must be 0 … {self._vocabulary_size - 1}",
                        parameter=name,
                        value=str(token),
                    )


def _check_beams(request: GenerateRequest) -> None:
    """Raises: ParameterRangeError for a single beam, UnsupportedParameterError for what beams cannot honour."""
    sampling = request.sampling
    if max(sampling.n, sampling.best_of or 0) < 2:
        raise ParameterRangeError(
            "use_beam_search with one beam is no search, best_of or n must be at least 2",
            parameter="best_of",
            value=str(sampling.best_of),
        )
    others = [name for name in sampling.changed() if name in _NOT_BY_BEAMS]
    if request.response_format not in (None, {"type": "text"}):
        others.append("response_format")
    if others:
        raise UnsupportedParameterError(
            f"parameter {others[0]!r} is not supported beside use_beam_search", parameter=others[0]
        )
