"""What a worker's session with one controller needs to know of those with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from zfabric.core.worker.backlog import Backlog
    from zfabric.core.worker.streams import WorkerStreams


class Siblings(Protocol):
    """The sessions of one worker, as one of them sees the others."""

    @property
    def overrun(self) -> bool:
        """Whether several controllers have sent more than there are slots."""

    @property
    def held(self) -> int:
        """Requests of all of them that hold a slot."""

    def elsewhere(self, session: WorkerStreams) -> int:
        """Slots that are not for this one: what the others use, and what they are to have."""

    def holder_of(self, request_id: str, besides: WorkerStreams) -> WorkerStreams | None:
        """Which of the others has a request, whatever becomes of it."""

    def answer_of(self, request_id: str) -> Backlog | None:
        """What any of them has of an answer."""

    def freed(self, session: WorkerStreams, now_ns: int) -> None:
        """A request of this one has ended."""
