"""What a request may ask for, whoever serves it: checked before anything is computed."""

from __future__ import annotations

from zfabric.errors import ParameterRangeError
from zfabric.limits import PROMPT_LOGPROBS_MAX
from zfabric.wire.sampling import SamplingParams


def check_logprobs(sampling: SamplingParams, most: int) -> None:
    """Raises: ParameterRangeError if log-probabilities of more alternatives are wanted than a worker gives."""
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(sampling, name)
        if wanted is not None and wanted > most:
            raise ParameterRangeError(
                f"{name} is {wanted}, it must be at most {most}, which the worker sets by --max-logprobs",
                parameter=name,
                value=str(wanted),
            )


def check_prompt_logprobs(wanted: int | None, tokens: int) -> None:
    """Raises: ParameterRangeError if those of a prompt would be more than go out in one piece."""
    entries = 0 if wanted is None else (wanted + 1) * tokens
    if entries > PROMPT_LOGPROBS_MAX:
        raise ParameterRangeError(
            f"prompt_logprobs is {wanted}, it must be at most {PROMPT_LOGPROBS_MAX // tokens - 1} for a prompt of "
            f"{tokens} tokens",
            parameter="prompt_logprobs",
            value=str(wanted),
        )
