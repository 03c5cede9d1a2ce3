"""From hidden states to vectors: poolings, and the steps that a sentence-transformers checkpoint has after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from safetensors.torch import load_file

from zfabric.backends.front.sentence_files import SentenceFiles, Step
from zfabric.errors import ConfigurationError, ParameterRangeError

#: What stands for a pooling where every token keeps a vector of its own.
TOKENS: Final = ("tokens",)

_Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Former names of poolings, as flags, in the order in which several are put side by side.
_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
#: Names of poolings that the fabric has others for.
_NAMES: Final = {"lasttoken": "last"}
#: What such a step's configuration may hold and still be understood, with the only value that is; None for any.
_DENSE: Final[dict[str, tuple[Any, ...] | None]] = {
    "in_features": None,
    "out_features": None,
    "bias": None,
    "activation_function": None,
    "use_residual": None,
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
}


class Pooler:
    """Makes a vector of each row's hidden states.

    Args:
        hidden_size: Of the model.
        modes: Poolings whose results are put side by side.
        with_prompt: Whether tokens of the model's own prompt take part.
        head: What follows, in order.
        dimensions: Length of a vector at the end.

    Attributes:
        hidden_size: As it was given.
    """

    def __init__(
        self, hidden_size: int, modes: Sequence[str] = ("mean",), *, with_prompt: bool = True, head: Any = None,
        dimensions: int | None = None,
    ) -> None:  # fmt: skip
        self.modes = tuple(modes)
        self.with_prompt = with_prompt
        self._head = head
        self._pooled = hidden_size * len(self.modes)
        self.hidden_size = hidden_size
        self.dimensions = self._pooled if dimensions is None else dimensions

    @property
    def has_layers(self) -> bool:
        """Whether it computes with weights of its own, which are not the model's."""
        return self._head is not None and any(True for _ in self._head.parameters())

    def chosen(self, wanted: str | None) -> tuple[str, ...]:
        """The poolings for a request.

        Raises:
            ParameterRangeError: The one it asks for gives vectors that the steps after it do not take.
        """
        if wanted is None:
            return self.modes
        if self._head is not None and self._pooled != self.hidden_size:
            raise ParameterRangeError(
                f"pooling is {wanted!r}, it must be unset for a model that puts {', '.join(self.modes)} side by side",
                parameter="pooling",
                value=wanted,
            )
        return (wanted,)

    def size(self, modes: Sequence[str]) -> int:
        """Length of a vector that is pooled so."""
        return self.dimensions if self._head is not None else self.hidden_size * len(modes)

    def __call__(
        self, hidden: torch.Tensor, lengths: torch.Tensor, prompts: torch.Tensor, modes: Sequence[str]
    ) -> list[torch.Tensor]:
        """A vector of each row, float32 (size); or those of its tokens, float32 (tokens, hidden size).

        Args:
            hidden: (rows, columns, hidden size), padded on the right.
            lengths: Columns in use of each row.
            prompts: How many of them are the model's own prompt.
        """
        columns = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = columns < lengths.unsqueeze(1)
        if not self.with_prompt:
            mask &= columns >= prompts.unsqueeze(1)
        if modes == TOKENS:
            return [row[: int(length)].float() for row, length in zip(hidden, lengths, strict=True)]
        vectors = torch.cat([_POOLINGS[mode](hidden.float(), mask) for mode in modes], dim=1)
        return list(vectors if self._head is None else self._head(vectors))

    def to(self, device: Any) -> Pooler:
        """Have its weights there."""
        if self._head is not None:
            self._head = self._head.to(device)
        return self


class _Dense(torch.nn.Module):
    """A linear layer with an activation, and perhaps what it was given added to what it makes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        inputs, outputs = int(settings["in_features"]), int(settings["out_features"])
        self.linear = torch.nn.Linear(inputs, outputs, bias=bool(settings.get("bias", True)))
        self.act = activation_of(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
        self.whole = bool(settings.get("use_residual", False))
        if self.whole and inputs != outputs:
            self.residual = torch.nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.act(self.linear(x))
        if not self.whole:
            return made
        return made + (self.residual(x) if hasattr(self, "residual") else x)


class _LayerNorm(torch.nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(int(settings["dimension"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class _Normalize(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)


def make_pooler(files: SentenceFiles, hidden_size: int, name: str, pooling: str | None) -> Pooler:
    """The pooler of a checkpoint; the mean where it says nothing.

    Args:
        pooling: Instead of the checkpoint's own.

    Raises:
        ConfigurationError: It has steps that are not done here, so its vectors would be wrong.
    """
    if files.steps is None:
        return Pooler(hidden_size, [pooling or "mean"])
    steps = [step for step in files.steps if step.kind != "Dropout"]
    if not steps or steps[0].kind != "Pooling":
        kinds = ", ".join(step.kind for step in steps) or "none"
        raise ConfigurationError(f"{name!r} has the steps {kinds} after its model: no vector of a whole text")
    modes = [pooling] if pooling else pooling_modes(steps[0].settings)
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown:
        raise ConfigurationError(f"{name!r} pools by {', '.join(unknown)}, which is not supported")
    # The request says whether vectors get length 1 at the end.
    later = steps[1:-1] if steps[-1].kind == "Normalize" else steps[1:]
    made = [_made(step, name) for step in later]
    size = hidden_size * len(modes)
    for module in made:
        size = module.linear.out_features if isinstance(module, _Dense) else size
    return Pooler(
        hidden_size,
        modes,
        with_prompt=bool(steps[0].settings.get("include_prompt", True)),
        head=torch.nn.Sequential(*made).eval() if made else None,
        dimensions=size,
    )


def pooling_modes(settings: dict[str, Any]) -> list[str]:
    """What the configuration of such a step names, in the fabric's words."""
    given = settings.get("pooling_mode")
    if given:
        return [_NAMES.get(mode, mode) for mode in ([given] if isinstance(given, str) else given)]
    return [mode for flag, mode in _FLAGS.items() if settings.get(flag)] or ["mean"]


def _made(step: Step, name: str) -> torch.nn.Module:
    try:
        if (
            step.kind == "Normalize"
            and step.settings.get("module_input_name", "sentence_embedding") == "sentence_embedding"
        ):
            return _Normalize()
        if step.kind == "Dense":
            for key, value in step.settings.items():
                if key not in _DENSE or value not in (_DENSE[key] or (value,)):
                    raise ConfigurationError(f"{name!r} has a step Dense with {key}={value!r}, which is not supported")
            return _with_weights(_Dense(step.settings), step)
        if step.kind == "LayerNorm":
            return _with_weights(_LayerNorm(step.settings), step)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"the step {step.kind} of {name!r} cannot be read: {error}") from error
    raise ConfigurationError(f"{name!r} has a step {step.kind!r} after its model, which is not supported")


def _with_weights(module: torch.nn.Module, step: Step) -> torch.nn.Module:
    if step.weights is None:
        raise ValueError("its weights are not there")
    if step.weights.suffix == ".safetensors":
        tensors = load_file(step.weights)
    else:
        tensors = torch.load(step.weights, map_location="cpu", weights_only=True)
    module.load_state_dict({key: value.float() for key, value in tensors.items()})
    return module.requires_grad_(False)


def activation_of(path: str | None) -> torch.nn.Module:
    """The activation of such a name. Raises: ValueError if it is none of torch's own."""
    if path is None:
        return torch.nn.Identity()
    kind = getattr(torch.nn, path.rpartition(".")[2], None) if path.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ValueError(f"its activation is {path!r}, it must be one of torch.nn")  # noqa: TRY004
    return kind()


def _cls(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.int().argmax(dim=1)]


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), _places(mask).argmax(dim=1)]


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(~mask.unsqueeze(2), float("-inf")).amax(dim=1)


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (hidden * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _mean_by_root(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (hidden * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True).float().sqrt()


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Later tokens count for more."""
    weights = _places(mask).float()
    return (hidden * weights.unsqueeze(2)).sum(dim=1) / weights.sum(dim=1, keepdim=True)


def _places(mask: torch.Tensor) -> torch.Tensor:
    """The number of each column from 1; 0 for those that are masked."""
    return torch.arange(1, mask.shape[1] + 1, device=mask.device).unsqueeze(0) * mask


_POOLINGS: Final[dict[str, _Pool]] = {
    "cls": _cls,
    "last": _last,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
}
