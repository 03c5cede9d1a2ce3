"""A backend whose process dies of one prompt, as an engine's does of what it cannot compute."""

from __future__ import annotations

import os
import signal
from typing import Final

from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.wire.payloads import GenerateRequest

POISON: Final = "poison"


class Poisoned(EchoWorker):
    """Echo, until it is asked for that."""

    Options = EchoOptions

    def begin(self, request: GenerateRequest) -> None:
        if request.prompt == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        super().begin(request)
