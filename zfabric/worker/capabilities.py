"""What models announce, held against what their backends implement, and requests against what models announce."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Final

from zfabric.errors import ConfigurationError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.chat import OPTIONS, Message
from zfabric.wire.messages import ModelInfo
from zfabric.wire.parts import has_media
from zfabric.wire.payloads import AnyRequest, CountRequest, TextRequest
from zfabric.wire.sampling import ALL_PARAMETERS
from zfabric.worker.base import OPERATIONS, BaseModelWorker, StepwiseModelWorker

#: What a model may be able to do beside operations: see `ModelInfo.capabilities`.
ABILITIES: Final = frozenset({"chat", "multimodal", "resume"})
#: All that `ModelInfo.parameters` may name.
PARAMETERS: Final = ALL_PARAMETERS | frozenset(OPTIONS)


def check_announcement(backend: BaseModelWorker, info: ModelInfo) -> None:
    """Hold what is announced of a model against the class of its backend.

    Raises:
        ConfigurationError: It names what nobody knows, or what the class does not implement.
    """
    kind = type(backend)
    if isinstance(backend, StepwiseModelWorker):
        if kind.generate is not BaseModelWorker.generate:
            raise ConfigurationError(
                f"{kind.__name__} is a StepwiseModelWorker, whose generate is never called: move what it does to begin and "
                f"abort, or derive from BaseModelWorker"
            )
    elif hasattr(kind, "begin"):
        raise ConfigurationError(f"{kind.__name__} has a method begin: derive it from StepwiseModelWorker")
    model = f"model {info.name!r} of {kind.__name__}"
    _check_names(f"{model} announces the capability", info.capabilities, OPERATIONS | ABILITIES)
    _check_names(f"{model} announces the parameter", info.parameters or (), PARAMETERS)
    for operation in sorted(OPERATIONS.intersection(info.capabilities) - backend.implemented()):
        raise ConfigurationError(
            f"{model} announces {operation!r}, which {kind.__name__} does not implement: override {operation}, or leave it "
            f"out of the model's capabilities",
            model=info.name,
            operation=operation,
        )


def check_request(request: AnyRequest, operation: str, model: str, capabilities: frozenset[str]) -> None:
    """Refuse what a model does not announce.

    Args:
        model: What errors call it.

    Raises:
        UnsupportedOperationError: An operation, messages, or what is no text in messages.
    """
    if operation not in capabilities:
        raise _unable(operation, f"{model} cannot {operation}; it can {_listed(capabilities & OPERATIONS)}")
    if not isinstance(request, TextRequest | CountRequest) or request.messages is None:
        return
    if "chat" not in capabilities:
        raise _unable("chat", f"{model} takes no messages, for want of a chat template or its like: send a prompt")
    if "multimodal" not in capabilities:
        _require_text(request.messages, model)


def check_options(request: TextRequest | CountRequest, model: str, parameters: frozenset[str]) -> None:
    """Refuse options of a request that a model does not announce among its parameters. Raises: UnsupportedParameterError."""
    for name in request.options:
        if name not in parameters:
            raise UnsupportedParameterError(
                f"parameter {name!r} is not supported by {model}", parameter=name, backend=model
            )


def refuse_unknown_extra(extra: Iterable[str], model: str, keys: Collection[str] | None) -> None:
    """Refuse keys of a request's `extra` that a model does not announce.

    Args:
        keys: Those that it does; None for any.

    Raises:
        UnsupportedParameterError: The first other one.
    """
    for name in extra:
        if keys is not None and name not in keys:
            known = _listed(keys)
            raise UnsupportedParameterError(
                f"extra {name!r} is not known to {model}, which knows {known}", parameter=name, backend=model
            )


def leave_tools_out(request: TextRequest | CountRequest) -> None:
    """Tools that may not be called are not shown to the model."""
    if request.chat is not None and request.chat.tool_choice == "none":
        request.tools = None


def _require_text(messages: Iterable[Message], model: str) -> None:
    for message in messages:
        found = has_media(message)
        if found is not None:
            raise _unable("multimodal", f"{model} reads text alone, a message has a part of type {found!r}")


def _check_names(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {close[0]!r}?" if close else f"there are {_listed(known)}"
            raise ConfigurationError(f"{what} {name!r}, which is none: {meant}")


def _unable(operation: str, message: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(message, operation=operation)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
