"""From options to a model and its tokenizer. The only place that imports transformers' factories."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    AutoProcessor,
    AutoTokenizer,
)

from zfabric.backends.front import sentence_files
from zfabric.backends.front.sentence_files import SentenceFiles
from zfabric.backends.hf_transformers.cache import attention
from zfabric.backends.hf_transformers.failures import out_of_memory
from zfabric.backends.hf_transformers.loading.cache_room import READERS, RUNNERS, Room, batch_size, room_of
from zfabric.backends.hf_transformers.loading.context_length import context_length, places
from zfabric.backends.hf_transformers.loading.kinds import Kind, is_half, kind_of
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.parameters import quantization
from zfabric.backends.hf_transformers.parameters.packing import pack
from zfabric.backends.hf_transformers.pooling.heads import Head
from zfabric.backends.hf_transformers.pooling.poolers import Pooler, make_pooler
from zfabric.backends.hf_transformers.runner.decoder_layers import shorten
from zfabric.backends.hf_transformers.runner.expert_padding import forget_padding
from zfabric.backends.hf_transformers.runner.tensor_parallel import check_model
from zfabric.errors import ConfigurationError

_FACTORIES: Final[dict[Kind, Any]] = {
    "causal": AutoModelForCausalLM,
    "paired": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
    "vision": AutoModelForImageTextToText,
    "encoder": AutoModel,
    "classifier": AutoModelForSequenceClassification,
}
#: What makes arguments of the model of things that are no text.
_PROCESSORS: Final[dict[Kind, Any]] = {"vision": AutoProcessor, "speech": AutoFeatureExtractor}

_UNKNOWN: Final = SentenceFiles()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded.

    Attributes:
        context_length: Tokens that a text may have here.
        length: Tokens that the model reads, or may read, whatever the cache holds.
        room: What the cache may take.
    """

    model: Any
    tokenizer: Any
    processor: Any
    kind: Kind
    context_length: int
    length: int
    room: Room
    batch_size_max: int
    pooler: Pooler
    sentences: SentenceFiles
    device: str
    dtype: str
    head: Head | None = None
    quantized: dict[str, str | int] = field(default_factory=dict)

    @property
    def kv_tokens_max(self) -> int:
        """Tokens that the cache may hold."""
        return self.room.tokens

    @property
    def generates(self) -> bool:
        """Whether it makes text."""
        return self.kind not in READERS

    @property
    def embeds(self) -> bool:
        """Whether it makes vectors of texts, or could."""
        return self.kind != "speech"

    @property
    def chats(self) -> bool:
        """Whether messages can be given to it; a sound comes in one."""
        return self.kind == "speech" or self.tokenizer.chat_template is not None

    @property
    def compares(self) -> bool:
        """Whether the angle of two of its vectors says how well texts fit: they were made for that."""
        return self.kind == "encoder" or self.sentences.steps is not None

    @property
    def encoder(self) -> Any:
        """The part that makes vectors."""
        if self.head is not None:
            return self.head.reader
        if self.kind in RUNNERS:
            return self.model.get_encoder()
        return self.model if self.kind == "encoder" else getattr(self.model, "model", self.model.base_model)


def load(options: TransformersOptions, *, token_bytes_beside: int = 0) -> Loaded:
    """Load as told. Each token of the cache takes so many bytes in one of another model besides.

    Raises:
        ConfigurationError: The model is of a kind that this backend does not serve, or the device is not there.
    """
    path = Path(options.model)
    if path.suffix == ".gguf":
        options = replace(options, model=str(path.parent), gguf_file=path.name)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    common = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    common |= {"gguf_file": options.gguf_file}
    common = {name: value for name, value in common.items() if value}
    try:
        files = _sentence_files(options, common)
        common |= {"subfolder": files.subfolder} if files.subfolder else {}
        config = AutoConfig.from_pretrained(options.model, **common)
        kind = kind_of(config, options.model, sentences=files.steps is not None)
        if kind == "encoder" and files is _UNKNOWN and options.pooling is None:
            raise _untold(options.model)
        if options.gguf_file is not None and kind == "encoder":
            # Such a file does not say what it is for; text is what they are made for.
            kind = "causal"
        if options.tensor_parallel > 1:
            check_model(config, kind, options.model, options.tensor_parallel)
        placement = _placement(options, device, config)
        tokenizer = AutoTokenizer.from_pretrained(options.model, **common)
        processor = _processor(kind, options.model, common)
        factory = _FACTORIES[kind]
        if kind == "encoder" and is_half(config):
            factory = AutoModelForTextEncoding
        model = factory.from_pretrained(options.model, **common, **placement)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise ConfigurationError(f"model {options.model!r} cannot be loaded: {error}", model=options.model) from error
    head, pooler = _pooling(config, model, kind, files, options)
    if kind == "vision":
        # The template of such a model may be its processor's; both have to make the same tokens.
        processor.tokenizer, own = tokenizer, processor.chat_template
        tokenizer.chat_template = tokenizer.chat_template or own
    _prepare_tokenizer(tokenizer, options)
    _check_positions(config, model, options.model)
    model = _settled(model, device, options)
    room = room_of(model, kind, options, token_bytes_beside)
    length = options.context_length or _length(config, model, tokenizer, kind, files)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        kind=kind,
        # What the cache cannot hold cannot be served: the smaller of the two is what clients are told.
        context_length=length if kind in READERS or not room.grows else min(length, room.tokens - room.row_cells),
        length=length,
        room=room,
        batch_size_max=options.max_batch_size or batch_size(model.device.type, room.tokens, room.usual_row),
        pooler=pooler.to(model.device),
        sentences=files,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        head=head,
        quantized=quantization.told(model, options.quantization, quantization.checkpoint_method(config)),
    )


def _settled(model: Any, device: str, options: TransformersOptions) -> Any:
    """On its device, and as it is run."""
    # Weights that are quantized or divided are where they belong already.
    divided = options.tensor_parallel > 1
    if options.device_map is None and not divided and getattr(model, "hf_quantizer", None) is None:
        model = model.to(device)
    model.eval()
    attention.install(model if options.attention is None else None)
    forget_padding(model)
    if options.pack_weights and not divided:
        pack(model)
    # What is compiled is not made of calls.
    if device == "cpu" and not divided and not options.compile:
        shorten(model)
    return model


def _sentence_files(options: TransformersOptions, hub: dict[str, Any]) -> SentenceFiles:
    """Files beside the model that say how it makes vectors; _UNKNOWN if nobody can tell whether there are any.

    Raises:
        ConfigurationError: They are broken.
    """
    if options.gguf_file is not None:
        return SentenceFiles()
    try:
        return sentence_files.read(options.model, hub)
    except OSError:
        return _UNKNOWN


def _untold(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"whether {name!r} says how it makes vectors cannot be found out: no connection, and no modules.json in the cache; "
        f"say it with --pooling",
        model=name,
    )


def _processor(kind: Kind, model: str, hub: dict[str, Any]) -> Any:
    """What makes arguments of images or sounds; None for models that read text alone."""
    return _PROCESSORS[kind].from_pretrained(model, **hub) if kind in _PROCESSORS else None


def _pooling(
    config: Any, model: Any, kind: Kind, files: SentenceFiles, options: TransformersOptions
) -> tuple[Head | None, Pooler]:
    """How hidden states become what is asked for. Raises: ConfigurationError: See `Head` and `make_pooler`."""
    _check_family(files, kind, options.model)
    if kind == "classifier":
        head = Head(model, files, options.model)
        return head, head.pooler
    return None, make_pooler(files, int(config.get_text_config().hidden_size), options.model, options.pooling)


def _check_family(files: SentenceFiles, kind: Kind, name: str) -> None:
    """Raises: ConfigurationError if the library does something else with its checkpoint than is done here."""
    wanted = "CrossEncoder" if kind == "classifier" else "SentenceTransformer"
    if files.steps is not None and files.family != wanted:
        raise ConfigurationError(
            f"{name!r} is a {files.family} of sentence-transformers, this backend serves SentenceTransformer, and "
            f"CrossEncoder with a classification head",
            family=files.family,
        )
    if kind == "classifier" and files.steps:
        steps = ", ".join(step.kind for step in files.steps)
        raise ConfigurationError(
            f"{name!r} has the steps {steps} after its classification head, which are not done here"
        )


def _prepare_tokenizer(tokenizer: Any, options: TransformersOptions) -> None:
    """Raises: ConfigurationError if the chat template cannot be read."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None:
        # Cutting and padding are ours to do. Left on, each call would switch them off, and calls come from two threads.
        inner.no_truncation()
        inner.no_padding()
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"chat template {options.chat_template} cannot be read: {error}") from error


def _check_positions(config: Any, model: Any, name: str) -> None:
    """Raises: ConfigurationError if positions have several dimensions, and the model does not tell those of an image."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope and not hasattr(getattr(model, "model", None), "get_rope_index"):
        raise ConfigurationError(f"{name!r} has positions in several dimensions and does not place images in them")


def _length(config: Any, model: Any, tokenizer: Any, kind: Kind, files: SentenceFiles) -> int:
    """The model's own length of context."""
    length = context_length(config.get_text_config())
    if kind == "speech":
        return places(model.get_decoder()) or length
    if kind != "vision":
        length = min(length, places(model) or length)
    if kind not in READERS:
        return length
    return min(files.length or length, length, int(tokenizer.model_max_length))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device {name!r} is not there: torch finds no CUDA device", device=name)
    return name


def _placement(options: TransformersOptions, device: str, config: Any) -> dict[str, Any]:
    """Arguments of from_pretrained that say where and in what form weights go. Raises: ConfigurationError: They do not go
    together."""
    arguments: dict[str, Any] = {"dtype": "auto" if options.dtype == "auto" else getattr(torch, options.dtype)}
    if options.attention is not None:
        arguments["attn_implementation"] = options.attention
    if options.gguf_file is not None:
        from transformers import GgufConfig

        arguments["quantization_config"] = GgufConfig(dequantize=True)
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
        if options.max_gpu_memory is not None:
            arguments["max_memory"] = dict.fromkeys(range(torch.cuda.device_count()), options.max_gpu_memory)
    if options.tensor_parallel > 1:
        from transformers.distributed import DistributedConfig

        return {**arguments, "distributed_config": DistributedConfig(tp_size=options.tensor_parallel)}
    if options.gguf_file is not None and options.quantization is not None:
        raise ConfigurationError(
            f"quantization {options.quantization!r} does not go with a GGUF file, which is unpacked"
        )
    quantized = quantization.arguments(
        options.quantization, config, device, arguments["dtype"], cpu_offload=options.cpu_offload
    )
    # What is asked for says where weights go; what quantizes them may say of which type the others are.
    return {**quantized, **arguments, **{name: value for name, value in quantized.items() if name != "device_map"}}
