"""What a caller is told of an error of vLLM's."""

from __future__ import annotations

from zfabric.errors import BackendError, FabricError, ParameterRangeError, QueueFullError, RequestError, WorkerLostError


def translated(error: BaseException) -> FabricError:
    """What a caller is told of an error of vLLM's."""
    from vllm import exceptions
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, FabricError):
        return error
    if isinstance(error, EngineDeadError):
        return WorkerLostError(f"engine died: {error}")
    if isinstance(error, exceptions.GracefulHTTPError):
        return QueueFullError(str(error))
    if isinstance(error, (exceptions.VLLMClientError, ValueError, TypeError, NotImplementedError)):
        parameter = getattr(error, "parameter", None)
        if parameter:
            return ParameterRangeError(str(error), parameter=str(parameter), value=str(getattr(error, "value", "")))
        return RequestError(str(error))
    return BackendError(f"{type(error).__name__}: {error}")
