"""vLLM's sampling parameters: which there are, and how a text is constrained."""

from __future__ import annotations

from typing import Any


def sampling_fields() -> frozenset[str]:
    """Fields of the installed version's sampling parameters."""
    from vllm import SamplingParams

    return frozenset(SamplingParams.__struct_fields__)


def dangerous_fields(engine: Any) -> frozenset[str]:
    """Sampling parameters that this engine would die of."""
    configuration = engine.vllm_config
    if configuration.lora_config is not None and configuration.device_config.device_type == "cpu":
        # Of two such requests in one step: the kernel takes rows of the prompt for requests.
        return frozenset({"prompt_logprobs"})
    return frozenset()


def structured_outputs(kind: str, value: Any) -> dict[str, Any]:
    """The sampling argument that constrains the text: kind is json, regex, choice, grammar or json_object."""
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**{kind: value})}
