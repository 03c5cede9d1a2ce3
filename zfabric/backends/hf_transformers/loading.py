"""From options to a model and its tokenizer. The only place that imports transformers' factories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

from zfabric.backends.hf_transformers import attention
from zfabric.backends.hf_transformers.context import context_length
from zfabric.backends.hf_transformers.embedding import own_length, own_pooling
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.packing import pack
from zfabric.errors import ConfigurationError

#: A CPU's cache: a gigabyte holds far more than a CPU can usefully step.
_CPU_CACHE_BYTES: Final = 1024**3
#: Part of the free device memory that the cache may take after the weights are there; the rest is for activations.
_DEVICE_CACHE_SHARE: Final = 0.8
#: Prompt and answer of a usual request.
_USUAL_TOKENS: Final = 1_024
#: A device reads its weights once for all rows, and computes so many rows in that time; a CPU only few.
_BATCH_MAX: Final = {"cpu": 32, "mps": 32}
_BATCH_MAX_OTHER: Final = 256
#: So many short ones fit nearly any cache; what does not fit waits.
_BATCH_MIN: Final = 4
#: Layers that remember by keys and values of each token, which is what a padded batch can hold.
_LAYER_KINDS: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
#: Kinds of models that remember otherwise and do not tell by their layers.
_RECURRENT: Final = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"})


#: Encoder-decoders whose decoder has relative positions, so that its rows can be padded.
_PAIRED: Final = frozenset({"t5", "mt5", "umt5"})
#: What a model is: a decoder, an encoder with a decoder, a decoder that sees images, or an encoder.
Kind = Literal["causal", "paired", "vision", "encoder"]
_FACTORIES: Final[dict[Kind, Any]] = {
    "causal": AutoModelForCausalLM,
    "paired": AutoModelForSeq2SeqLM,
    "vision": AutoModelForImageTextToText,
    "encoder": AutoModel,
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded."""

    model: Any
    tokenizer: Any
    processor: Any
    kind: Kind
    context_length: int
    kv_tokens_max: int
    batch_size_max: int
    dimensions: int
    pooling: str
    device: str
    dtype: str

    @property
    def generates(self) -> bool:
        """Whether it makes text."""
        return self.kind != "encoder"

    @property
    def encoder(self) -> Any:
        """The part that makes vectors."""
        if self.kind == "paired":
            return self.model.get_encoder()
        return self.model if self.kind == "encoder" else getattr(self.model, "model", self.model.base_model)


def load(options: TransformersOptions) -> Loaded:
    """Load as told.

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
    placement = _placement(options, device)
    try:
        config = AutoConfig.from_pretrained(options.model, **common)
        kind = _kind(config, options.model)
        if options.gguf_file is not None and kind == "encoder":
            # Such a file does not say what it is for; text is what they are made for.
            kind = "causal"
        tokenizer = AutoTokenizer.from_pretrained(options.model, **common)
        processor = AutoProcessor.from_pretrained(options.model, **common) if kind == "vision" else None
        model = _FACTORIES[kind].from_pretrained(options.model, **common, **placement)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(f"model {options.model!r} cannot be loaded: {error}", model=options.model) from error
    generates = kind != "encoder"
    if processor is not None:
        # The template of such a model may be its processor's; both have to make the same tokens.
        processor.tokenizer, own = tokenizer, processor.chat_template
        tokenizer.chat_template = tokenizer.chat_template or own
    _prepare_tokenizer(tokenizer, options)
    _check_positions(config, model, options.model)
    # Weights that are quantized are where they belong already.
    if options.device_map is None and getattr(model, "hf_quantizer", None) is None:
        model = model.to(device)
    model.eval()
    attention.install()
    if options.pack_weights:
        pack(model)
    kv_tokens_max = options.kv_tokens_max or _kv_tokens(config, model)
    length = options.context_length or _length(config, tokenizer, options.model, generates=generates)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        kind=kind,
        # What the cache cannot hold cannot be served: the smaller of the two is what clients are told.
        context_length=min(length, kv_tokens_max) if generates else length,
        kv_tokens_max=kv_tokens_max,
        batch_size_max=options.max_batch_size or _batch_size(model.device.type, kv_tokens_max),
        dimensions=int(config.get_text_config().hidden_size),
        pooling=options.pooling or own_pooling(Path(options.model)),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
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


def _kind(config: Any, name: str) -> Kind:
    """Raises: ConfigurationError if it is a model whose memory is not a cache of keys and values by column."""
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type not in _PAIRED:
            raise ConfigurationError(
                f"{name!r} is an encoder-decoder model of type {config.model_type!r}, this backend serves "
                f"{', '.join(sorted(_PAIRED))}"
            )
        return "paired"
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    others = sorted(kinds - _LAYER_KINDS)
    if others or config.model_type in _RECURRENT:
        raise ConfigurationError(
            f"{name!r} has layers of kind {', '.join(others) or 'recurrent'}, which this backend does not serve"
        )
    if getattr(config, "vision_config", None) is not None and text is not config:
        return "vision"
    makes_text = any("ForCausalLM" in kind or "LMHead" in kind for kind in config.architectures or ())
    return "causal" if makes_text else "encoder"


def _check_positions(config: Any, model: Any, name: str) -> None:
    """Raises: ConfigurationError if positions have several dimensions, and the model does not tell those of an image."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope and not hasattr(getattr(model, "model", None), "get_rope_index"):
        raise ConfigurationError(f"{name!r} has positions in several dimensions and does not place images in them")


def _length(config: Any, tokenizer: Any, name: str, *, generates: bool) -> int:
    """The model's own length of context."""
    length = context_length(config.get_text_config())
    if generates:
        return length
    return min(own_length(Path(name)) or length, length, int(tokenizer.model_max_length))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device {name!r} is not there: torch finds no CUDA device", device=name)
    return name


def _placement(options: TransformersOptions, device: str) -> dict[str, Any]:
    """Arguments of from_pretrained that say where and in what form weights go."""
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
    if options.cpu_offload and options.quantization != "8bit":
        raise ConfigurationError("cpu_offload goes with quantization 8bit alone")
    if options.quantization is not None:
        if not device.startswith("cuda"):
            raise ConfigurationError(f"quantization {options.quantization!r} needs a CUDA device", device=device)
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.quantization == "8bit",
            load_in_4bit=options.quantization == "4bit",
            llm_int8_enable_fp32_cpu_offload=options.cpu_offload,
        )
        arguments.setdefault("device_map", device)
    return arguments


def _batch_size(device_type: str, kv_tokens_max: int) -> int:
    """Sequences that the cache holds at a usual length, as far as more of them still make more tokens."""
    return max(_BATCH_MIN, min(_BATCH_MAX.get(device_type, _BATCH_MAX_OTHER), kv_tokens_max // _USUAL_TOKENS))


def _kv_tokens(config: Any, model: Any) -> int:
    """Tokens that the cache may hold: what the device has left, by what one token takes in all layers."""
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    token_bytes = 2 * layers * heads * size * model.dtype.itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return max(1, int(free * _DEVICE_CACHE_SHARE) // token_bytes)
    return max(1, _CPU_CACHE_BYTES // token_bytes)
