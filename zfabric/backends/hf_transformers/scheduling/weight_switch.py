"""The moment between two steps in which a model's weights become others, and what that means for requests that run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from zfabric.backends.hf_transformers.scheduling.engine_core import EngineCore

#: What becomes of requests that run: they end first, while nothing new begins; they go on with what is cached of them; they
#: go on, and what is cached of them is computed anew; or they end there.
SwitchMode = Literal["wait", "keep", "recompute", "abort"]
MODES: Final[tuple[SwitchMode, ...]] = get_args(SwitchMode)


class WeightSwitch:
    """One such moment to come. It is made on any thread, and the rest belongs to the engine's.

    Args:
        change: Changes the weights, or raises and changes nothing.
        mode: What becomes of requests that run.
        version: What the new weights are called.

    Attributes:
        future: Requests that ran then, once it is over; or why nothing was changed. It may be cancelled until then.
    """

    def __init__(self, change: Callable[[], None], mode: SwitchMode, version: str) -> None:
        self._change = change
        self._mode: SwitchMode = mode
        self._version = version
        self.future: Future[int] = Future()

    def made(self, core: EngineCore) -> bool:
        """Make it if it is time. Returns whether it is over, well or not."""
        if self._mode == "wait" and not self.future.cancelled():
            core.hold()
            if core.busy:
                return False
        if self.future.set_running_or_notify_cancel():
            try:
                self._change()
                running = core.renew(self._mode, self._version)
            except BaseException as error:  # noqa: BLE001 — handed to whoever asked for it
                self.future.set_exception(error)
            else:
                self.future.set_result(running)
        core.release()
        return True

    def end(self, error: Exception) -> None:
        """It never comes."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
