"""What kind of model a configuration describes, and which kinds are refused by name."""

from __future__ import annotations

from typing import Any, Final, Literal

from zfabric.backends.hf_transformers.cache.state_cache import BOTH, STATES
from zfabric.backends.hf_transformers.runner.expert_padding import bounds_experts
from zfabric.errors import ConfigurationError

#: What a model is: a decoder, an encoder with a decoder, one whose encoder hears, a decoder that sees images, an encoder, or any
#: of them with a head that judges texts.
Kind = Literal["causal", "paired", "speech", "vision", "encoder", "classifier"]

#: Layers that remember by keys and values of each token, or by a state of each row, which is what a padded batch can hold.
_LAYER_KINDS: Final = (
    frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "indexed_attention"})
    | STATES
    | BOTH
)
#: Kinds of models whose code, in transformers itself, mixes rows in a step: RWKV adds the last tokens of all to each.
_MIXING: Final = frozenset({"rwkv"})
#: Encoder-decoders that hear, whose answers begin with what says how.
_SPEECH: Final = frozenset({"whisper"})
#: Kinds of models whose interface is that of a language model, and whose tokens are no text: sounds, or a verdict.
_NO_TEXT: Final = frozenset({"moshi", "musicgen", "musicgen_melody", "shieldgemma2"})
#: Heads that pretraining leaves on an encoder, which say nothing of what it is for.
_PRETRAINING: Final = ("ForMaskedLM", "ForPreTraining", "ForTextEncoding")


def kind_of(config: Any, name: str, *, sentences: bool) -> Kind:
    """The kind of a model.

    Args:
        sentences: Its files say how it makes vectors of texts.

    Raises:
        ConfigurationError: It remembers in a way that this backend cannot tell rows of apart; or it is neither for text nor for
            vectors, so that both would be wrong.
    """
    architectures = tuple(config.architectures or ())
    if any(one.endswith("ForSequenceClassification") for one in architectures):
        return "classifier"
    if any(one.endswith("EncoderModel") for one in architectures):
        return "encoder"
    if sentences and getattr(config, "is_encoder_decoder", False):
        return "encoder"
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type in _SPEECH and any(one.endswith("ForConditionalGeneration") for one in architectures):
            return "speech"
        _refuse_pairs(config, name)
        return "paired"
    if config.model_type in _NO_TEXT:
        raise ConfigurationError(f"{name!r} is a model of type {config.model_type!r}, whose answers are no text")
    text = config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_KINDS)
    if others:
        raise ConfigurationError(f"{name!r} has layers of kind {', '.join(others)}, which this backend does not serve")
    if config.model_type in _MIXING:
        raise ConfigurationError(
            f"{name!r} is a model of type {config.model_type!r}, whose code in transformers mixes the rows of a batch when "
            f"it steps them",
            architecture=config.model_type,
        )
    if getattr(config, "vision_config", None) is not None and text is not config:
        return "vision"
    if any("ForCausalLM" in one or "LMHead" in one for one in architectures) or _is_text(config, architectures):
        _refuse_halves(config, name)
        return "causal"
    if not sentences:
        _refuse_heads(architectures, name)
    return "encoder"


def _is_text(config: Any, architectures: tuple[str, ...]) -> bool:
    """Whether a model is what transformers takes for a language model of its type, whatever its class is called."""
    from transformers.models.auto import modeling_auto as tables

    return tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in architectures


def _refuse_pairs(config: Any, name: str) -> None:
    """Raises: ConfigurationError if it is an encoder-decoder that is not made to write texts that answer texts."""
    from transformers.models.auto import modeling_auto as tables

    kind = config.model_type
    if kind not in tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigurationError(
            f"{name!r} is an encoder-decoder model of type {kind!r}, which does not make texts of texts",
            architecture=kind,
        )
    if bounds_experts(config):
        raise ConfigurationError(
            f"{name!r} has experts that take a share of a batch's tokens and leave out the others, so that what a text says "
            f"depends on its company",
            architecture=kind,
        )
    bare = tables.MODEL_MAPPING_NAMES.get(kind)
    if bare is not None and tuple(config.architectures or ()) == (bare,):
        raise ConfigurationError(f"{name!r} is a {bare}, which has no head that makes text", architecture=bare)


def is_half(config: Any) -> bool:
    """Whether a model is the encoder of an encoder-decoder, or is to be loaded as if it were."""
    names = tuple(config.architectures or ())
    return bool(getattr(config, "is_encoder_decoder", False)) or any(name.endswith("EncoderModel") for name in names)


def _refuse_halves(config: Any, name: str) -> None:
    """Raises: ConfigurationError if it is the decoder of an encoder-decoder, which was trained to read an encoder."""
    from transformers.models.auto import modeling_auto as tables

    pairs = {**tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, **tables.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    if config.model_type in {*pairs, "trocr"} and getattr(config, "is_encoder_decoder", None) is not None:
        raise ConfigurationError(
            f"{name!r} is the decoder of an encoder-decoder model of type {config.model_type!r}, which says nothing "
            f"without its encoder",
            architecture=config.model_type,
        )


def _refuse_heads(architectures: tuple[str, ...], name: str) -> None:
    """Raises: ConfigurationError if what the model says is not in its hidden states, but in a head on top of them."""
    for one in architectures:
        if one.endswith(_PRETRAINING) or (one.endswith("Model") and "For" not in one):
            continue
        head = one.partition("For")[2] or one
        raise ConfigurationError(
            f"{name!r} is a {one}: what its head {head} says is not served by this backend, and its hidden states alone "
            f"are no embeddings",
            architecture=one,
        )
