"""Puts an engine together: model, input processor, batch and the queue of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zfabric.backends.front import generation_config
from zfabric.backends.front.adapters import Adapters
from zfabric.backends.front.bounds import longest_token
from zfabric.backends.front.embed_inputs import EmbedInputs, with_special_tokens
from zfabric.backends.front.generation_config import GenerationDefaults
from zfabric.backends.front.parsing import AnswerFormat, template_text
from zfabric.backends.front.prompts import PromptTokens
from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout
from zfabric.backends.hf_transformers.cache.own_states import state_cache_of
from zfabric.backends.hf_transformers.checks.paged_check import layout_or_reason
from zfabric.backends.hf_transformers.checks.pair_check import check_pairs
from zfabric.backends.hf_transformers.checks.self_check import check_padding, check_rows, check_verdicts
from zfabric.backends.hf_transformers.checks.state_check import check_states
from zfabric.backends.hf_transformers.failures import give_memory_back
from zfabric.backends.hf_transformers.loading.cache_room import RUNNERS, runner_of
from zfabric.backends.hf_transformers.loading.model_loader import Loaded, load
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.parameters.lora import Adapter, Lora
from zfabric.backends.hf_transformers.pooling.classifying import Classifier
from zfabric.backends.hf_transformers.pooling.embed_queue import EmbedQueue
from zfabric.backends.hf_transformers.pooling.embedding import Embedder
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.request.token_budget import TokenBudget
from zfabric.backends.hf_transformers.runner.encoder_decoder import EncoderDecoderRunner
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.backends.hf_transformers.runner.speech import SpeechRunner
from zfabric.backends.hf_transformers.runner.step_graphs import capture_of
from zfabric.backends.hf_transformers.runner.tensor_parallel import Ranks
from zfabric.backends.hf_transformers.runner.vision import Vision
from zfabric.backends.hf_transformers.scheduling.engine import Engine
from zfabric.backends.hf_transformers.scheduling.engine_core import Step
from zfabric.backends.hf_transformers.scheduling.hearing import Hearing
from zfabric.backends.hf_transformers.scheduling.input_processor import InputProcessor
from zfabric.backends.hf_transformers.setup.paging import fitted, paged_runner
from zfabric.backends.hf_transformers.setup.speculation_setup import Assistant, load_assistant, speculation_of
from zfabric.errors import ConfigurationError, FabricError
from zfabric.wire.sampling import UNSETTABLE
from zfabric.wire.tasks import EmbedRequest


@dataclass(frozen=True, slots=True)
class Assembled:
    """A running engine and what belongs to it.

    Attributes:
        adapters: Those that requests can name.
        classifier: Makes pieces of requests to a model with a head; None for others.
        defaults: What the model says of its answers, where a request does not.
        prompts: Makes tokens of them.
        lora: Reads adapters, and has the model apply them.
        answer_format: How the model writes reasoning and calls.
        ranks: The others that the model is divided over.
        layout: Which layers share blocks of the cache; why its rows are padded and not paged; None if there is no cache.
        graphs: Sizes of steps that are recorded, or why none could be; None where none are to be.
        vision: What sees pictures for prompts that are computed in parts; None if there are none.
    """

    loaded: Loaded
    engine: Engine
    embedder: Embedder
    classifier: Classifier | None
    queue: EmbedQueue
    prompts: PromptTokens
    lora: Lora
    adapters: Adapters[Adapter]
    defaults: GenerationDefaults
    answer_format: AnswerFormat
    layout: KVLayout | str | None
    graphs: int | str | None
    vision: Vision | None
    ranks: Ranks | None


class Told(NamedTuple):
    """Who is called of what an engine does; see `Engine`."""

    on_step: Callable[[Step], None]
    on_failure: Callable[[Answer, FabricError], None]
    on_restart: Callable[[FabricError], None]
    on_death: Callable[[FabricError], None]


def assemble(
    options: TransformersOptions,
    names: tuple[str, ...],
    *,
    on_step: Callable[[Step], None],
    on_failure: Callable[[Answer, FabricError], None],
    on_restart: Callable[[FabricError], None],
    on_death: Callable[[FabricError], None],
) -> Assembled:
    """Load, start the engine and warm it up. Takes as long as that takes.

    Args:
        names: Of the model, aliases included.

    Raises:
        RequestError: An adapter has the model's name.
        ConfigurationError: See `load`, `check_rows`, `Lora.read`; or compile is asked for where it does not go.
    """
    told = Told(on_step, on_failure, on_restart, on_death)
    if options.tensor_parallel == 1:
        return _assemble(options, names, told, None)
    ranks = Ranks(options, on_death)
    try:
        return _assemble(options, names, told, ranks)
    except BaseException:
        ranks.close()
        raise


def _assemble(options: TransformersOptions, names: tuple[str, ...], told: Told, ranks: Ranks | None) -> Assembled:
    """See `assemble`; the model may be divided over ranks, whose first one this process is."""
    assistant, loaded = _loaded(options)
    template = template_text(loaded.tokenizer.chat_template)
    answer_format = AnswerFormat(template, tools=options.tool_parser, reasoning=options.reasoning_parser)
    model = _model(loaded, options)
    _check(loaded, model, options.model)
    if ranks is None:
        _observe(loaded, model)
    adapters = _adapters(options, model, names)
    layout = layout_or_reason(loaded, model, options) if loaded.generates else None
    paged = None
    if isinstance(layout, KVLayout):
        loaded = fitted(loaded, layout, options)
        paged = paged_runner(loaded, model, layout, options, ranks)
    prompts = PromptTokens(
        loaded.tokenizer, vocabulary_size=model.read_vocabulary_size, context_length=loaded.context_length
    )
    defaults = generation_defaults(loaded, options.generation_config)
    engine = Engine(
        model,
        _input_processor(loaded, options, model, prompts, adapters, defaults, answer_format),
        loaded.tokenizer,
        paged=paged,
        batch_size_max=loaded.batch_size_max,
        kv_tokens_max=loaded.kv_tokens_max,
        search_tokens_max=loaded.room.search_tokens,
        token_budget=TokenBudget(_prefill_tokens(loaded, options), options.prefill_wait_ms / 1_000),
        **told._asdict(),
        speculation=speculation_of(options, loaded, model, assistant, layout if isinstance(layout, str) else None),
    )
    embedder = _embedder(loaded, model, adapters)
    classifier = _classifier(loaded, prompts, adapters)
    if classifier is not None:
        check_verdicts(loaded.model, embedder, classifier, options.model)
    queue = EmbedQueue(
        embedder,
        engine.run_job,
        options.embed_batch_tokens,
        token_budget=TokenBudget(options.embed_batch_tokens, options.prefill_wait_ms / 1_000),
        running=lambda: engine.running,
    )
    engine.start()
    graphs = None
    if loaded.generates:
        graphs = engine.run_job(lambda: _warm_up(model, paged, loaded, options, ranks)).result()
    if classifier is None and ranks is None and loaded.embeds:
        queue.submit(embedder.pieces(EmbedRequest(inputs=["warm-up"]))).result()
    return Assembled(
        loaded, engine, embedder, classifier, queue, prompts, model.lora, adapters, defaults, answer_format, layout, graphs,
        model.vision, ranks,
    )  # fmt: skip


def _loaded(options: TransformersOptions) -> tuple[Assistant | None, Loaded]:
    """The assistant, whose weights are there when memory is planned, and the model."""
    assistant = load_assistant(options)
    return assistant, load(options, token_bytes_beside=0 if assistant is None else assistant.token_bytes)


def _prefill_tokens(loaded: Loaded, options: TransformersOptions) -> int:
    """Tokens that are computed between two steps at most. What encoders read is not cut, so a device has as many as in a pass for
    vectors, such as five sounds of Whisper; a CPU computes several no sooner together than one after the other."""
    together = loaded.kind in RUNNERS and loaded.model.device.type != "cpu"
    return options.embed_batch_tokens if together else options.prefill_chunk_tokens


def _adapters(options: TransformersOptions, model: ModelRunner, names: tuple[str, ...]) -> Adapters[Adapter]:
    """Those that are given at the start, installed."""
    adapters: Adapters[Adapter] = Adapters(names)
    for name, path in adapter_paths(options.lora):
        adapter = model.lora.read(name, path)
        model.lora.install(adapter)
        adapters.put(name, adapter)
    return adapters


def _model(loaded: Loaded, options: TransformersOptions) -> ModelRunner:
    """The forward pass. Raises: ConfigurationError if it cannot be compiled, and is to be."""
    if options.compile and loaded.kind != "causal":
        raise ConfigurationError("compile goes with causal language models alone", model=options.model)
    ropes = Ropes(loaded.model)
    if options.compile and ropes:
        raise ConfigurationError("compile does not go with positions whose frequencies change", model=options.model)
    if options.compile and state_cache_of(loaded.model.config) is not None:
        raise ConfigurationError("compile does not go with layers that keep a state", model=options.model)
    model = runner_of(loaded.kind)(loaded.model, ropes, compiled=options.compile)
    model.row_cells, model.grows = loaded.room.row_cells, loaded.room.grows
    return model


def _check(loaded: Loaded, model: ModelRunner, name: str) -> None:
    """Raises: ConfigurationError if it says otherwise in a batch than alone; models with a head for verdicts are asked later."""
    if isinstance(model, EncoderDecoderRunner):
        check_pairs(model, loaded.model, loaded.tokenizer, name)
    elif loaded.generates and model.states:
        check_states(model, loaded.model, loaded.tokenizer, name)
    elif loaded.kind in ("causal", "vision"):
        check_rows(model, loaded.model, loaded.tokenizer, name)
    elif loaded.kind == "encoder":
        check_padding(loaded.encoder, loaded.tokenizer, name)


def _observe(loaded: Loaded, model: ModelRunner) -> None:
    """Have adapters know which layers the model calls. A text shows it: not of layers for images, nor of heads, which are run
    apart from their model."""
    if loaded.kind in ("vision", "classifier"):
        return
    with model.lora.observed(), torch.inference_mode():
        if isinstance(model, EncoderDecoderRunner):
            model.probe()
        else:
            loaded.model(input_ids=torch.zeros((1, 8), dtype=torch.long, device=loaded.model.device))


def _warm_up(
    model: ModelRunner,
    paged: PagedRunner | None,
    loaded: Loaded,
    options: TransformersOptions,
    ranks: Ranks | None,
) -> int | str | None:
    """Have what is made at first use there before the worker says that it is ready. Returns `Assembled.graphs`."""
    model.paged = paged is not None
    model.warm_up()
    if paged is None:
        return None
    paged.warm_up()
    capture = capture_of(paged.model.device)
    # Ranks compute what they are told of each pass.
    if capture is None or options.enforce_eager or ranks is not None:
        return None
    try:
        paged.record(loaded.batch_size_max, loaded.context_length, capture)
    except Exception as error:  # noqa: BLE001 — whatever a model or a device refuses, steps are computed as ever
        give_memory_back()
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    assert paged.graphs is not None
    if loaded.room.memory is not None:
        loaded.room.memory.graphs = paged.graphs.bytes
    return len(paged.graphs.sizes)


def _input_processor(
    loaded: Loaded,
    options: TransformersOptions,
    model: ModelRunner,
    prompts: PromptTokens,
    adapters: Adapters[Adapter],
    defaults: GenerationDefaults,
    answer_format: AnswerFormat,
) -> InputProcessor:
    return InputProcessor(
        loaded.tokenizer,
        prompts,
        vocabulary_size=model.vocabulary_size,
        context_length=loaded.context_length,
        end_tokens=_end_tokens(loaded.model, loaded.tokenizer),
        seed=options.seed,
        start_token=_start_token(loaded),
        adapters=adapters,
        processor=loaded.processor if loaded.kind == "vision" else None,
        hearing=_hearing(loaded, model),
        logprobs_max=options.max_logprobs,
        defaults=defaults,
        answer_format=answer_format,
    )


def _hearing(loaded: Loaded, model: ModelRunner) -> Hearing | None:
    """What prepares sounds, for models that hear."""
    if not isinstance(model, SpeechRunner):
        return None
    start = _start_token(loaded)
    assert start is not None
    return Hearing(
        loaded.processor, loaded.tokenizer, model, loaded.model.generation_config,
        start=start, context_length=loaded.context_length,
    )  # fmt: skip


def generation_defaults(loaded: Loaded, source: str) -> GenerationDefaults:
    """What the model, or another directory, says of answers.

    Args:
        source: "auto", "none", or a directory that holds a generation_config.json.

    Raises:
        ConfigurationError: The directory has none that can be read.
    """
    if not loaded.generates or source == "none":
        return GenerationDefaults()
    settings = getattr(loaded.model, "generation_config", None)
    if source != "auto":
        from transformers import GenerationConfig

        try:
            settings = GenerationConfig.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"generation_config of {source!r} cannot be read: {error}") from error
    return generation_config.read({} if settings is None else settings.to_diff_dict(), UNSETTABLE)


def _embedder(loaded: Loaded, model: ModelRunner, adapters: Adapters[Adapter]) -> Embedder:
    inputs = EmbedInputs(
        with_special_tokens(loaded.tokenizer, lower_case=loaded.sentences.lower_case),
        context_length=loaded.context_length,
        vocabulary_size=int(loaded.model.get_input_embeddings().weight.shape[0]),
        prompts=loaded.sentences.prompts,
        prompt_name=loaded.sentences.prompt_name,
        longest=longest_token(loaded.tokenizer),
    )
    return Embedder(
        loaded.encoder,
        inputs,
        pad_token=loaded.tokenizer.pad_token_id or 0,
        pooler=loaded.pooler,
        lora=model.lora,
        adapters=adapters,
        ropes=model.ropes,
        divisible=loaded.kind == "causal" and not model.states,
    )


def _classifier(loaded: Loaded, prompts: PromptTokens, adapters: Adapters[Adapter]) -> Classifier | None:
    if loaded.head is None:
        return None
    return Classifier(
        loaded.tokenizer,
        prompts,
        loaded.head,
        context_length=loaded.context_length,
        vocabulary_size=int(loaded.model.get_input_embeddings().weight.shape[0]),
        adapters=adapters,
    )


def adapter_paths(given: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Names and directories of adapters given as name=path.

    Raises:
        ConfigurationError: One has another form.
    """
    found = []
    for one in given:
        name, separator, path = one.partition("=")
        if not (name and separator and path):
            raise ConfigurationError(f"adapter {one!r} is not of the form name=path", adapter=one)
        found.append((name, Path(path)))
    return found


def _start_token(loaded: Loaded) -> int | None:
    """What the decoder begins with, if an encoder reads the prompt."""
    if loaded.kind not in ("paired", "speech"):
        return None
    for settings in (loaded.model.generation_config, loaded.model.config):
        token = getattr(settings, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    # `generate` takes this one then.
    token = getattr(loaded.model.generation_config, "bos_token_id", None)
    return int(loaded.tokenizer.pad_token_id or 0) if token is None else int(token)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation settings and the tokenizer."""
    found: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for value in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)
