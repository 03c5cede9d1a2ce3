"""What one session of a worker holds: what runs, what is being stopped, and what has finished and may still be asked for."""

from __future__ import annotations

from itertools import islice
from typing import Final, NamedTuple

from zfabric import limits
from zfabric.core.worker.backlog import Backlog
from zfabric.core.worker.kept import KeptAnswers
from zfabric.core.worker.observer import WorkerObserver
from zfabric.core.worker.orders import StreamOrder
from zfabric.core.worker.packing import carried_of
from zfabric.core.worker.siblings import Siblings
from zfabric.core.worker.soundness import outcome_of
from zfabric.errors import FabricError, RequestCancelledError
from zfabric.wire import codec
from zfabric.wire.chunks import EndsBody
from zfabric.wire.load import Load, StreamUnits
from zfabric.wire.messages import Carried, End, Ends

#: An upper bound of what `StreamUnits` takes.
_UNITS_BYTES: Final = 28


class Stopping(NamedTuple):
    """A request whose engine is to stop, and the error that it ends with then."""

    stream: Backlog
    error: FabricError


class StreamTables:
    """All requests that one session of a worker has, by name.

    Args:
        name: The worker's name.
        stream_interval: Units gathered into one chunk after the first one.
        load: What the worker tells of itself, to all of its controllers.
        observer: Is told what happens to requests; its own where None is given.
        siblings: The worker's sessions with other controllers; None where there are none.

    Attributes:
        outbox: Messages to send, in order.
        streams: What runs, by name of the request.
        stopping: What is to stop, and still has its slot.
        registered: Whether there is a session.
        draining: Whether new requests are handed back.
        observer: Is told what happens to requests.
    """

    def __init__(
        self,
        name: str,
        stream_interval: int,
        load: Load | None = None,
        observer: WorkerObserver | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.name = name
        self.load = load or Load()
        self.outbox: list[codec.Frames] = []
        self.streams: dict[str, Backlog] = {}
        self.stopping: dict[str, Stopping] = {}
        self.registered = False
        self.draining = False
        self.observer = observer or WorkerObserver(name)
        self._siblings = siblings
        #: Operators' calls, which need no slot.
        self._calls: set[str] = set()
        #: The time of the event that is being handled.
        self._now_ns = 0
        self._stream_interval = stream_interval
        self._frame_bytes_max = limits.FRAME_BYTES_MAX
        self._frame_goal = limits.FRAME_BYTES_GOAL
        self._kept = KeptAnswers()
        self._dirty: dict[str, Backlog] = {}
        self._orders: list[StreamOrder] = []

    @property
    def busy(self) -> bool:
        """Whether any request holds a slot."""
        return bool(self.streams or self.stopping)

    @property
    def held(self) -> int:
        """Requests that hold a slot."""
        held = len(self.streams) + len(self.stopping)
        return held - len(self._calls) if self._calls else held

    @property
    def running(self) -> int:
        """Of those that hold a slot, the ones that are not to stop."""
        return len(self.streams) - sum([call in self.streams for call in self._calls])

    def carried(self) -> list[Carried]:
        """All that another controller has to know of: what runs, what still stops, and what may have a reader."""
        stopping = [entry.stream for entry in self.stopping.values()]
        return [carried_of(stream) for stream in (*self.streams.values(), *stopping, *self._kept)]

    def units_made(self) -> list[StreamUnits]:
        """How far each stream is; as many as leave room for the rest of a load report. A client may say that it has more units
        than can be told."""
        most = min(limits.SLOTS_MAX, limits.CONTROL_BODY_BYTES_MAX // 2 // _UNITS_BYTES)
        return [
            StreamUnits(instance=it.instance, request=it.request, attempt=it.attempt, units=min(it.end, 2**32 - 1))
            for it in islice(self.streams.values(), most)
        ]

    def forget_readers(self) -> None:
        """There is no session: nobody is known to read, until the next controller says who does."""
        stopping = [entry.stream for entry in self.stopping.values()]
        for stream in (*self.streams.values(), *stopping, *self._kept):
            stream.client = None
        self._dirty.clear()

    def has(self, request_id: str) -> bool:
        """Whether it is one of this controller's, whatever becomes of it."""
        return request_id in self.streams or request_id in self.stopping or self._kept.get(request_id) is not None

    def answer_of(self, request_id: str) -> Backlog | None:
        """What runs or has finished under a name, and can be read."""
        return self.streams.get(request_id) or self._kept.get(request_id)

    def release(self, request_id: str, now_ns: int) -> Backlog | None:
        """Let another controller's reader have an answer; to this one, its request has ended. None if it is not here."""
        stream = self.answer_of(request_id)
        if stream is None:
            return None
        self.streams.pop(request_id, None)
        self._kept.drop(request_id)
        self._dirty.pop(request_id, None)
        self._calls.discard(request_id)
        if self.registered:
            error = RequestCancelledError("the request goes on by another controller")
            self._tell(stream.instance, stream.request, stream.attempt, error)
        return stream

    def _tell(self, instance: int, request: int, attempt: int, error: FabricError) -> None:
        """A terminal of which nothing else is known, or wanted."""
        code, outcome = outcome_of(error)
        envelope = Ends(instance=instance, ends=[End(request=request, attempt=attempt, code=code)])
        self.outbox.append((codec.pack_envelope(envelope), codec.encode(EndsBody(outcomes=[outcome]))))
