"""From options to speculation: the assistant, whether it fits the model, and whoever guesses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from zfabric.backends.hf_transformers.cache.paged_cache import block_tokens
from zfabric.backends.hf_transformers.checks.paged_check import layout_or_reason
from zfabric.backends.hf_transformers.loading.context_length import context_length, places, token_bytes
from zfabric.backends.hf_transformers.loading.model_loader import Loaded, load
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.backends.hf_transformers.speculative.assistant_proposer import AssistantProposer
from zfabric.backends.hf_transformers.speculative.ngram_proposer import NgramProposer
from zfabric.backends.hf_transformers.speculative.speculation import Proposer, Speculation, pass_tokens_max
from zfabric.errors import ConfigurationError

#: Layers whose keys and values of drafts that were wrong are written over, and whose state is nothing besides.
_KEPT_BY_TOKEN: Final = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class Assistant:
    """A model that guesses.

    Attributes:
        token_bytes: What a token takes in its cache.
        context_length: Tokens that it can read.
    """

    loaded: Loaded
    model: ModelRunner
    token_bytes: int
    context_length: int


def load_assistant(options: TransformersOptions) -> Assistant | None:
    """The assistant, if there is to be one. It is loaded before the model, so that its weights are there when memory is planned.

    Raises:
        ConfigurationError: Options contradict one another, or it cannot be loaded, or has no pages.
    """
    _check(options)
    if options.assistant is None:
        return None
    its = TransformersOptions(
        model=options.assistant,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        pack_weights=options.pack_weights,
        threads=options.threads,
        kv_cache="paged",
        # The model's own, once that is known; so no memory is planned for it by itself.
        kv_tokens_max=1,
    )
    loaded = load(its)
    if loaded.room.memory is not None:
        loaded.room.memory.release()
    model = ModelRunner(loaded.model, Ropes(loaded.model))
    layout_or_reason(loaded, model, its)
    length = context_length(loaded.model.config.get_text_config())
    return Assistant(loaded, model, token_bytes(model.probe()), min(length, places(loaded.model) or length))


def speculation_of(
    options: TransformersOptions, loaded: Loaded, model: ModelRunner, assistant: Assistant | None, padded: str | None
) -> Speculation | None:
    """Whoever guesses for a model.

    Args:
        padded: Why its rows are padded; None if they are not.

    Raises:
        ConfigurationError: The model cannot be guessed for, or not by this assistant.
    """
    if options.speculation is None:
        return None
    reason = f"its rows are padded: {padded}" if padded is not None else None
    if not loaded.generates:
        reason = "it makes no text"
    kinds = set(getattr(loaded.model.config.get_text_config(), "layer_types", None) or ()) - _KEPT_BY_TOKEN
    if reason is None and kinds:
        reason = f"it has layers of kind {', '.join(sorted(kinds))}, whose state cannot be taken back"
    if reason is not None:
        raise ConfigurationError(
            f"speculation {options.speculation!r} does not go with {options.model!r}: {reason}", model=options.model
        )
    proposer: Proposer = NgramProposer(options.prompt_lookup_min, options.prompt_lookup_max)
    if assistant is not None:
        _check_vocabulary(options, loaded, assistant.loaded)
        size = block_tokens(model.device)
        runner = PagedRunner(assistant.model, -(-loaded.kv_tokens_max // size), size)
        proposer = AssistantProposer(runner, model.vocabulary_size, assistant.context_length)
    return Speculation(
        proposer,
        draft_tokens_max=options.num_speculative_tokens,
        pass_tokens_max=pass_tokens_max(model.device.type),
    )


def _check(options: TransformersOptions) -> None:
    """Raises: ConfigurationError if options of speculation contradict one another."""
    if options.speculation == "assistant" and options.assistant is None:
        raise ConfigurationError("speculation is 'assistant', but no assistant is given")
    if options.assistant is not None and options.speculation != "assistant":
        raise ConfigurationError(
            f"assistant {options.assistant!r} is given, but speculation is {options.speculation!r} and not 'assistant'"
        )
    for name in ("num_speculative_tokens", "prompt_lookup_min"):
        if getattr(options, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(options, name)}, and has to be 1 at least")
    if options.prompt_lookup_max < options.prompt_lookup_min:
        raise ConfigurationError(
            f"prompt_lookup_max is {options.prompt_lookup_max}, less than prompt_lookup_min, {options.prompt_lookup_min}"
        )


def _check_vocabulary(options: TransformersOptions, loaded: Loaded, assistant: Loaded) -> None:
    """Raises: ConfigurationError if the assistant's tokens are others."""
    mine, its = loaded.tokenizer.get_vocab(), assistant.tokenizer.get_vocab()
    if mine == its:
        return
    token = min(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token))
    raise ConfigurationError(
        f"assistant {options.assistant!r} has another vocabulary than {options.model!r}: {token!r} is "
        f"{its.get(token)} and not {mine.get(token)}",
        assistant=options.assistant or "",
        model=options.model,
    )
