"""zfabric: a low-latency fabric between programs that need tokens and the engines that make them.

Importing this package opens nothing, starts nothing, and loads neither torch nor numpy.
"""

from __future__ import annotations

from zfabric.backends.front.text import TextModelWorker
from zfabric.client.aio import AsyncClient
from zfabric.client.blocking import BlockingStream
from zfabric.client.many import BlockingBatch, CompletionBatch
from zfabric.client.options import AnswerOptions, ChatMessage, EmbedOptions, EmbedTokensOptions, GenerateOptions
from zfabric.client.reader import AnswerReader, AnswerStream
from zfabric.client.results import Choice, Classification, Completion, ToolCall
from zfabric.client.stream import TokenStream
from zfabric.client.sync import Client
from zfabric.errors import (
    AccessError,
    AuthenticationError,
    BackendError,
    CellLoopError,
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    ContextOverflowError,
    DeadlineExceededError,
    EndedError,
    EndpointInUseError,
    EngineStalledError,
    FabricError,
    IncorrectKeyError,
    NameTakenError,
    NoWorkerError,
    OutOfMemoryError,
    OverloadError,
    ParameterRangeError,
    PermissionDeniedError,
    PoisonousRequestError,
    ProtocolError,
    QueueFullError,
    QuotaExceededError,
    RateLimitedError,
    RequestCancelledError,
    RequestError,
    StoppedByOperatorError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    UnsupportedOperationError,
    UnsupportedParameterError,
    VersionMismatchError,
    WorkerDrainingError,
    WorkerLostError,
    WorkerTimeoutError,
)
from zfabric.transport.curve import Credentials
from zfabric.version import __version__
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, GenerateRequest, Logprob, TokenLogprobs, Usage
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import EmbedRequest, EmbedResult
from zfabric.wire.tool_calls import ToolCallDelta
from zfabric.worker.base import BaseModelWorker, StepwiseModelWorker

__all__ = [
    "AccessError",
    "AnswerOptions",
    "AnswerReader",
    "AnswerStream",
    "AsyncClient",
    "AuthenticationError",
    "BackendError",
    "BaseModelWorker",
    "BlockingBatch",
    "BlockingStream",
    "CellLoopError",
    "ChatMessage",
    "Choice",
    "Classification",
    "Client",
    "ClosedError",
    "Completion",
    "CompletionBatch",
    "ConfigurationError",
    "ConnectionLostError",
    "ContextOverflowError",
    "CountRequest",
    "Credentials",
    "DeadlineExceededError",
    "Delta",
    "EmbedOptions",
    "EmbedRequest",
    "EmbedResult",
    "EmbedTokensOptions",
    "EndedError",
    "EndpointInUseError",
    "EngineStalledError",
    "FabricError",
    "GenerateOptions",
    "GenerateRequest",
    "IncorrectKeyError",
    "Logprob",
    "ModelInfo",
    "NameTakenError",
    "NoWorkerError",
    "OutOfMemoryError",
    "OverloadError",
    "ParameterRangeError",
    "PermissionDeniedError",
    "PoisonousRequestError",
    "ProtocolError",
    "QueueFullError",
    "QuotaExceededError",
    "RateLimitedError",
    "RequestCancelledError",
    "RequestError",
    "SamplingParams",
    "StepwiseModelWorker",
    "StoppedByOperatorError",
    "TextModelWorker",
    "TokenLogprobs",
    "TokenStream",
    "TooLargeError",
    "ToolCall",
    "ToolCallDelta",
    "UnavailableError",
    "UnknownModelError",
    "UnsupportedOperationError",
    "UnsupportedParameterError",
    "Usage",
    "VersionMismatchError",
    "WorkerDrainingError",
    "WorkerLostError",
    "WorkerTimeoutError",
    "__version__",
]
