"""Outsiders: a client and a worker that speak the protocol without a mistake, and without sense.

Each draws its words from the grammar, in any order, at any time. On a fabric with keys they hold one that allows little;
without keys they leave alone what is anybody's right there, such as to take a worker's name or to drain it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from zfabric.core.controller.access import Grant, Role
from zfabric.testing.grammar import Gossip, Grammar
from zfabric.testing.network import Link, Network
from zfabric.testing.world import World
from zfabric.wire import codec, kinds


class Hostile:
    """A peer that says anything, and hears without heeding.

    Args:
        counter: Counts what was said, by kind.
        keyed: Whether the fabric has keys.
        period_ms: Mean time between two bursts of words.
    """

    honest: Final = False
    roams: Final = False
    #: What its key allows on a fabric with keys.
    grant: Grant

    def __init__(
        self, world: World, network: Network, gossip: Gossip, counter: Counter[str], *, keyed: bool, period_ms: float
    ) -> None:
        self.world = world
        self.network = network
        self.gossip = gossip
        self.keyed = keyed
        self.alive = True
        self.link: Link | None = None
        self.instance = world.rng.getrandbits(63)
        #: Every instance number that it has ever spoken under.
        self.instances = {self.instance}
        self.grammar = Grammar(world.rng, gossip)
        self.grammar.several = len(network.all) > 1
        self._counter = counter
        self._period_ms = period_ms
        self._token = b""
        self._queries = 0
        network.connect(self)
        world.after(world.rng.uniform(0, period_ms), self._speak)

    def die(self) -> None:
        """Gone for good."""
        self.alive = False
        link, self.link = self.link, None
        if link is not None:
            self.network.cut(link, peer_alive=False)

    def link_up(self, link: Link) -> None:
        if not self.alive:
            self.network.cut(link, peer_alive=False)
            return
        self.link = link
        if self.world.rng.random() < 0.9:
            self.say(self.hello())

    def link_down(self, link: Link) -> None:
        if link is self.link:
            self.link = None

    def link_message(self, header: bytes, body: bytes) -> None:
        if header[0] == kinds.WELCOME:
            self._token = codec.unpack_control(header).token
        elif header[0] == kinds.UNKNOWN_SESSION and self.world.rng.random() < 0.5:
            self.say(self.hello())

    def say(self, frames: codec.Frames) -> None:
        """Send one message."""
        if self.link is not None:
            self._counter[kinds.NAMES[frames[0][0]]] += 1
            self.link.to_hub(*frames)

    def _speak(self) -> None:
        if not self.alive:
            return
        rng = self.world.rng
        word = rng.choice(self.words())
        for _ in range(rng.choice([1, 1, 2, 6])):
            self.say(word())
        if rng.random() < 0.03 and self.link is not None:
            self.network.cut(self.link)
        self.world.after(rng.uniform(0, 2 * self._period_ms), self._speak)

    def hello(self) -> codec.Frames:
        raise NotImplementedError

    def words(self) -> list[Callable[[], codec.Frames]]:
        """What it may say."""
        raise NotImplementedError


class HostileClient(Hostile):
    """Submits what it has submitted, claims what is others', and says HELLO as somebody else."""

    grant = Grant("outsider", frozenset({Role.CLIENT}), models=("evil", "alpha"))

    def hello(self) -> codec.Frames:
        rng = self.world.rng
        instance = self.instance
        if rng.random() < 0.3:
            # Under another's number, which stands in the log of any worker.
            instance = self.grammar.attempt()[0]
            self.instances.add(instance)
        return self.grammar.client_hello(instance, self._token if rng.random() < 0.7 else rng.randbytes(16))

    def words(self) -> list[Callable[[], codec.Frames]]:
        grammar = self.grammar
        common = [self.hello, grammar.claims, grammar.cancel, grammar.credit, self._query, grammar.beat]
        return [grammar.submit, grammar.submit, grammar.submit, *common, grammar.goodbye]

    def _query(self) -> codec.Frames:
        self._queries += 1
        return self.grammar.query(self._queries)


class HostileWorker(Hostile):
    """Registers, announces what is others', ends what it was never given, and writes to whom it does not serve."""

    grant = Grant("outsider", frozenset({Role.WORKER}), models=("evil",), workers=("evil*",))

    def hello(self) -> codec.Frames:
        rng = self.world.rng
        name = "evil-0" if not self.keyed or rng.random() < 0.7 else rng.choice(self.gossip.workers)
        token = self._token if rng.random() < 0.7 else b""
        return self.grammar.worker_hello(name, self.instance, token, collide=self.keyed)

    def words(self) -> list[Callable[[], codec.Frames]]:
        grammar = self.grammar
        common = [self.hello, grammar.carried, grammar.load, grammar.load, grammar.beat, grammar.goodbye]
        words = [grammar.ends, grammar.ends, grammar.chunks, grammar.chunks, *common]
        return [*words, grammar.located, grammar.located] if grammar.several else words
