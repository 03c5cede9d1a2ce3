"""`TextModelWorker`: a backend for engines that make text from text, written in a few lines.

Its author turns a prompt into pieces of text. Chat, stop strings, several choices, echo, bounds, usage and continued answers are
made of that here, once for all such engines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from msgspec import structs

from zfabric.backends.front.stop_strings import StopStrings
from zfabric.errors import UnsupportedOperationError
from zfabric.wire.chat import Message
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, FinishReason, GenerateRequest, Usage
from zfabric.wire.sampling import ALL_PARAMETERS
from zfabric.worker.base import BaseModelWorker

#: What is done here, whatever the engine does.
_OWN = frozenset({"max_new_tokens", "stop", "n", "echo"})


class TextModelWorker(BaseModelWorker):
    """Base of backends whose engine makes text from text.

    .. code-block:: python

        class Parrot(TextModelWorker):
            repeatable = True

            async def load(self):
                return ModelInfo(name="parrot")

            async def complete(self, prompt, request):
                for word in prompt.split():
                    yield word + " "

    A piece of text counts as one token: of `max_new_tokens`, of the usage, and of what the reader of a continued answer has.
    The generator of `complete` is closed as soon as nothing more is wanted of it.

    Class attributes:
        parameters: What `complete` honours by itself, as `temperature` and `seed`. `max_new_tokens`, `stop`, `n` and `echo` are
            honoured besides, by this class; others are refused by name. None: `complete` is handed all of the sampling.
        repeatable: Whether the same request makes the same pieces again, at any worker. An answer whose worker dies goes on
            at another one then, which makes it anew and leaves out what its reader has.
    """

    parameters: ClassVar[frozenset[str] | None] = frozenset()
    repeatable: ClassVar[bool] = False

    @abstractmethod
    def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        """Pieces of the text that follows a prompt, until it ends by itself.

        Args:
            prompt: A text, also where the request has messages.
            request: For its `sampling`. Each of several choices comes with a seed of its own, if it has one.

        Raises:
            FabricError: Reaches the caller as it is. Anything else becomes a BackendError.
        """

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a chat. By default one line for each message, by role, and the beginning of the assistant's; a model
        that was trained on a template of its own should have that here.

        Example:
            >>> self.render([{"role": "user", "content": "Hello"}])
            'user: Hello\\nassistant:'
        """
        lines = [f"{message.get('role', 'user')}: {text_of(message)}" for message in messages]
        return "\n".join([*lines, "assistant:"])

    def count(self, prompt: str) -> int:
        """Tokens of a prompt. By default its words, and the usage says that it is an estimate."""
        return len(prompt.split())

    # ── what it makes of that ───────────────────────────────────────────────────────────────────────────────────────

    def announcement(self, info: ModelInfo) -> ModelInfo:
        capabilities = {
            "generate",
            "chat",
            "count_tokens",
            *info.capabilities,
            *(["resume"] if self.repeatable else []),
        }
        told = self.parameters if info.parameters is None else info.parameters
        # Tools are a matter of `render`, which is not given any.
        parameters = {*(ALL_PARAMETERS if told is None else told), *_OWN}
        return structs.replace(
            info, capabilities=sorted(capabilities), parameters=sorted(parameters), extra=self.extra_of(info)
        )

    async def count_tokens(self, request: CountRequest) -> int:
        return self.count(self._prompt(request.prompt, request.messages))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.prompt_token_ids is not None:
            raise UnsupportedOperationError("this model reads text, not token ids", operation="generate")
        prompt = self._prompt(request.prompt, request.messages)
        tokens = self.count(prompt)
        made = 0
        for index in range(request.sampling.n):
            async for delta in self._choice(prompt, request, index):
                made += len(delta.token_ids)
                if delta.finish_reason is not None and index == request.sampling.n - 1:
                    total = made + len(request.resume_token_ids)
                    delta.usage = Usage(tokens, total, estimated=type(self).count is TextModelWorker.count)
                yield delta

    async def _choice(self, prompt: str, request: GenerateRequest, index: int) -> AsyncIterator[Delta]:
        """One choice. Token ids are the numbers of pieces: how far a reader has come is known by them."""
        sampling = request.sampling
        stops = StopStrings(sampling.stop)
        limit, known = sampling.max_new_tokens, len(request.resume_token_ids)
        # The prompt leaves with the first piece: what has no piece would be one of its own to who counts them.
        head = prompt if sampling.echo else ""
        #: Characters that the reader has and that come again, and text of its pieces that it lacks.
        unseen, lacking = max(0, request.resume_characters - len(head)), head[request.resume_characters :]
        reason: FinishReason = "stop"
        number = 0
        pieces = self.complete(prompt, _for_choice(request, index))
        try:
            async for piece in pieces:
                text, found = stops.add(piece)
                number += 1
                lacking += text[unseen:]
                unseen = max(0, unseen - len(text))
                if number > known:
                    yield Delta(text=lacking, token_ids=[number], index=index)
                    lacking = ""
                if found:
                    break
                if limit is not None and number >= limit:
                    reason = "length"
                    break
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()
        rest = lacking + stops.finish()[unseen:]
        yield Delta(text=rest, index=index, finish_reason=reason, stop_reason=stops.found)

    def _prompt(self, prompt: str | None, messages: Sequence[Message] | None) -> str:
        return self.render(messages) if messages is not None else prompt or ""


def text_of(message: Message) -> str:
    """The text of a message, whether its content is a text or parts.

    Example:
        >>> text_of({"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]})
        'one\\ntwo'
    """
    content: Any = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "\n".join(text for text in texts if isinstance(text, str))
    return str(content or "")


def _for_choice(request: GenerateRequest, index: int) -> GenerateRequest:
    """The request of one of several choices, which must not be the same draw."""
    seed = request.sampling.seed
    if seed is None or not index:
        return request
    return structs.replace(request, sampling=structs.replace(request.sampling, seed=(seed + index) % 2**63))
