"""Valid messages in any order: what a peer may say that means no well.

Every message here decodes at its receiver. What makes them hostile is who says them, when, and whose numbers they name.
Numbers come from a `Gossip`: whatever an outsider could have overheard or read in a log.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Final

from zfabric.testing.catalogue import ALL, NAMES
from zfabric.testing.tasks import in_turn, with_tasks
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, Outcome
from zfabric.wire.chunks import EndsBody
from zfabric.wire.fields import Operation
from zfabric.wire.flow import Abort, Cancel, Credit, CreditLine
from zfabric.wire.load import CachedBlocks, Load
from zfabric.wire.messages import (
    Beat,
    Carried,
    CarriedMore,
    Claim,
    Claims,
    ClientHello,
    Drain,
    End,
    Ends,
    Goodbye,
    Located,
    ModelInfo,
    Submit,
    WorkerHello,
)
from zfabric.wire.payloads import CountRequest, GenerateRequest
from zfabric.wire.questions import Query
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import EmbedRequest

_OPERATIONS: Final[tuple[Operation, ...]] = ("generate", "generate", "embed", "count_tokens", "operate")
_LAST_32: Final = 2**32 - 1
_LAST_63: Final = 2**63 - 1


@dataclass
class Gossip:
    """What is known of the others.

    Attributes:
        attempts: (instance, request, attempt) of well-behaved clients.
        sessions: Numbers of client sessions.
        workers: Names of workers.
    """

    attempts: list[tuple[int, int, int]] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)


class Grammar:
    """Draws messages.

    Args:
        rng: Chance.
        gossip: Others' numbers.
    """

    def __init__(self, rng: random.Random, gossip: Gossip) -> None:
        self.rng = rng
        self.gossip = gossip
        #: In turn, so that what is drawn is what was drawn before there were these.
        self._unusual = itertools.cycle(["nothing", "requests", "clients", "queue", "config", "kick", "explain"])
        self._turns = itertools.count()
        self._caches = random.Random(1)
        #: Whether there are several controllers, and chance for what is only said then.
        self.several = False
        self._moves = random.Random(2)
        self.own: list[int] = [0, _LAST_63, *(rng.getrandbits(63) for _ in range(6))]

    def attempt(self) -> tuple[int, int, int]:
        """Somebody's (instance, request, attempt)."""
        if self.gossip.attempts and self.rng.random() < 0.8:
            return self.rng.choice(self.gossip.attempts)
        return self.rng.getrandbits(63), self.rng.getrandbits(63), 0

    def request(self) -> int:
        """A request's number: one of a few own ones, or somebody else's."""
        return self.rng.choice(self.own) if self.rng.random() < 0.7 else self.attempt()[1]

    # ── as a client ─────────────────────────────────────────────────────────────────────────────────────────────────

    def client_hello(self, instance: int, token: bytes) -> codec.Frames:
        """HELLO, with claims for what may be anybody's."""
        claims = [self._claim() for _ in range(self.rng.choice([0, 0, 1, 5]))]
        hello = ClientHello(
            version=kinds.PROTOCOL_VERSION,
            build="",
            instance=instance,
            token=token,
            claims=claims,
            secret=self.rng.randbytes(self.rng.choice([0, 16, 64])),
        )
        return codec.pack(hello)

    def claims(self) -> codec.Frames:
        return codec.pack(Claims([self._claim() for _ in range(self.rng.randint(0, 6))]))

    def _claim(self) -> Claim:
        rng = self.rng
        if rng.random() < 0.6:
            _, request, attempt = self.attempt()
        else:
            request, attempt = self.request(), rng.randint(0, 3)
        return Claim(
            request=request,
            attempt=attempt,
            next=rng.choice([0, 1, 7, _LAST_32]),
            window=rng.choice([0, 1_024, _LAST_32]),
            model=rng.choice(["", *NAMES, "nobody's"]),
            moved=self.several and self._moves.random() < 0.7,
            worker=self._moves.choice(["", *self.gossip.workers]) if self.several else "",
        )

    def submit(self) -> codec.Frames:
        rng = self.rng
        operation = rng.choice(_OPERATIONS)
        submit = Submit(
            request=self.request(),
            attempt=rng.choice([0, 0, 1, 1, 2, 1_000]),
            operation=in_turn(operation, next(self._turns)),
            model=rng.choice([*NAMES, *NAMES, "evil", "", "nobody's", "x" * 256]),
            priority=rng.choice([0, 0, -1_000, 1_000]),
            deadline_ms=rng.choice([None, None, 0, 1, 500, 7 * 24 * 3_600_000]),
            window=rng.choice([0, 1, 1_024, _LAST_32]),
            resume_from=rng.choice([0, 0, 0, 1, 5, _LAST_32]),
            worker=rng.choice(["", "", "", "", *self.gossip.workers]) if operation == "operate" else "",
        )
        return codec.pack_envelope(submit), self._body()

    def _body(self) -> bytes:
        """A request, or bytes that read as something else."""
        rng = self.rng
        what = rng.randrange(10)
        if what < 4:
            count = rng.randint(1, 20)
            return codec.encode(GenerateRequest(prompt="0//0/", sampling=SamplingParams(max_new_tokens=count)))
        return (
            codec.encode(EmbedRequest(inputs=["0//0/"])),
            codec.encode(CountRequest(prompt="0//0/")),
            b"",
            codec.pack(Drain(0))[0],
            codec.pack(Abort(instance=self.attempt()[0], attempts=[self.attempt()[1:]]))[0],
            codec.pack(Goodbye("so long"))[0],
        )[what - 4]

    def cancel(self) -> codec.Frames:
        return codec.pack(Cancel([self.request() for _ in range(self.rng.choice([1, 1, 5, 200]))]))

    def credit(self) -> codec.Frames:
        rng = self.rng
        lines = [
            CreditLine(
                request=self.request(),
                attempt=rng.choice([0, 0, 1, 1_000]),
                next=rng.choice([0, 1, _LAST_32]),
                window=rng.choice([0, 1, 5, _LAST_32]),
                again=rng.random() < 0.3,
            )
            for _ in range(rng.randint(1, 8))
        ]
        return codec.pack(Credit(lines))

    def query(self, number: int) -> codec.Frames:
        rng = self.rng
        what = rng.choice(["models", "model", "workers", "status", "nothing"])
        if what == "nothing":
            what = next(self._unusual)
        arguments: dict[str, object] = {"kind": "all"} if what == "models" else {"name": rng.choice(NAMES)}
        if what == "explain":
            arguments = {"request": f"{self.gossip.attempts[-1][1] if self.gossip.attempts else 7:x}"}
        return codec.pack(Query(number=number, what=what, arguments=arguments))

    def beat(self) -> codec.Frames:
        return codec.pack(Beat(self.rng.choice([0, 1, _LAST_63])))

    def goodbye(self) -> codec.Frames:
        return codec.pack(Goodbye(self.rng.choice(["", "so long"])))

    # ── as a worker ─────────────────────────────────────────────────────────────────────────────────────────────────

    def worker_hello(self, name: str, instance: int, token: bytes, *, collide: bool) -> codec.Frames:
        """HELLO, with others' requests as carried ones, and with keys under others' names."""
        rng = self.rng
        names = ["evil", *(NAMES if collide else ())]
        models = [
            ModelInfo(
                name=rng.choice(names),
                aliases=[rng.choice(names) for _ in range(rng.randint(0, 2))],
                capabilities=with_tasks(ALL),
                slots=rng.choice([0, 1, 65_536]),
                engine=rng.choice([0, 3, 1_023]),
            )
            for _ in range(rng.randint(1, 3))
        ]
        carried = [self._carried() for _ in range(rng.choice([0, 1, 8]))]
        hello = WorkerHello(
            version=kinds.PROTOCOL_VERSION,
            build="",
            name=name,
            instance=instance,
            models=models,
            load=self._load(),
            speed=rng.choice([0.0, 1.0, 1e9, float("inf")]),
            beats=rng.random() < 0.8,
            token=token,
            carried=carried,
            minor=kinds.MINOR_VERSION if self.several else 0,
            # Some are cells, of themselves or too deep.
            cells=[instance] if instance % 3 == 0 else [],
            depth=instance % 7 if instance % 5 == 0 else 0,
        )
        return codec.pack(hello)

    def carried(self) -> codec.Frames:
        return codec.pack(CarriedMore([self._carried() for _ in range(self.rng.randint(0, 6))]))

    def located(self) -> codec.Frames:
        """An answer to what it may have been asked, or somebody else was."""
        number = self._moves.randint(0, 40)
        carried = [self._carried() for _ in range(self._moves.randint(0, 3))]
        return codec.pack(Located(number=number, carried=carried, more=self._moves.random() < 0.3))

    def _carried(self) -> Carried:
        instance, request, attempt = self.attempt()
        return Carried(
            instance=instance,
            request=request,
            attempt=attempt,
            operation="generate",
            model=self.rng.choice(["evil", *NAMES]),
            finished=self.rng.random() < 0.5,
            lock=self.rng.randbytes(self.rng.choice([0, 16])),
        )

    def load(self) -> codec.Frames:
        return codec.pack(self._load())

    def _load(self) -> Load:
        rng = self.rng
        number = [0, 1, 7, _LAST_32]
        return Load(
            running=rng.choice(number),
            waiting=rng.choice(number),
            slots=rng.choice([0, 1, 8, 65_536]),
            progress=rng.choice([0, 1, _LAST_63]),
            tokens_per_second=rng.choice([0.0, -1.0, 1e300]),
            dispatches=rng.choice([0, _LAST_63 - 1]),
            kv_blocks_free=rng.choice([None, -5, 0]),
            draining=rng.random() < 0.1,
            gauges={"cache": 0.5},
            engines=[rng.choice([None, 0, 5, _LAST_63]) for _ in range(rng.choice([0, 1, 4]))],
            cached=self._cached_blocks(),
        )

    def _cached_blocks(self) -> list[CachedBlocks]:
        # Of its own chance: the seeds that once failed draw the rest as they did.
        rng = self._caches
        return [
            CachedBlocks(
                model=rng.choice(NAMES),
                stored=rng.randbytes(rng.choice([0, 8, 9, 800])),
                removed=rng.randbytes(rng.choice([0, 8, 15])),
                whole=rng.random() < 0.3,
                unit=rng.choice([0, 1, 16, 24, _LAST_32]),
            )
            for _ in range(rng.choice([0, 0, 2]))
        ]

    def chunks(self) -> codec.Frames:
        """For whoever has this number."""
        rng = self.rng
        client = rng.choice(self.gossip.sessions) if self.gossip.sessions else rng.getrandbits(32)
        _, request, attempt = self.attempt()
        return codec.pack_chunks(client, [Chunk(request, attempt, 0, rng.choice([0, 1, 9]), "evil", [6, 6, 6])])

    def ends(self) -> codec.Frames:
        """Of requests that were given to others, or to nobody, and twice."""
        rng = self.rng
        instance, _, _ = self.attempt()
        ends = []
        for _ in range(rng.choice([0, 1, 1, 3])):
            _, request, attempt = self.attempt()
            ends += [End(request=request, attempt=attempt, code=rng.choice([0, 50301, 49901, 99_999]))] * rng.choice(
                [1, 2]
            )
        outcomes = [Outcome(units=rng.choice([0, 5])) for _ in ends]
        return codec.pack_envelope(Ends(instance=instance, ends=ends)), codec.encode(EndsBody(outcomes=outcomes))
