"""zfabric: a low-latency fabric between programs that need tokens and the engines that make them.

Importing this package opens nothing, starts nothing, and loads neither torch nor numpy.
"""

from __future__ import annotations

from zfabric.client.aio import AsyncClient
from zfabric.client.results import Choice, Completion
from zfabric.client.stream import TokenStream
from zfabric.client.sync import BlockingStream, Client
from zfabric.errors import FabricError
from zfabric.transport.curve import Credentials
from zfabric.version import __version__
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import (
    CountRequest,
    Delta,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    Logprob,
    SamplingParams,
    TokenLogprobs,
    Usage,
)
from zfabric.worker.base import BaseModelWorker

__all__ = [
    "AsyncClient",
    "BaseModelWorker",
    "BlockingStream",
    "Choice",
    "Client",
    "Completion",
    "CountRequest",
    "Credentials",
    "Delta",
    "EmbedRequest",
    "EmbedResult",
    "FabricError",
    "GenerateRequest",
    "Logprob",
    "ModelInfo",
    "SamplingParams",
    "TokenLogprobs",
    "TokenStream",
    "Usage",
    "__version__",
]
