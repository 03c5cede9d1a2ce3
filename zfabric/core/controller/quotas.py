"""Limits of keys: how much a group of keys may have at a time, and in a time.

What is counted, and when:

* A request counts as in flight from its acceptance until nothing is left of it: one that was cancelled counts until its worker
  says that it has stopped, so that nobody gets more engine time by cancelling.
* A request counts for the rate when it is accepted. What is refused counts for nothing. The next attempt of what was lost with
  its worker is the same request.
* Tokens are the units of an answer (docs/protocol.md): a token, or a delta that carries none. Bodies are never opened, so they
  are counted once, when the attempt is over: as many as its worker says with the terminal that it has made, or, where the worker
  was lost, as many as its client has said to have. Those of a former attempt are not counted twice, and prompts not at all:
  they have a limit of their own. So what runs may take a group below zero, and nothing new of it is accepted before that
  is made up for.

A controller that starts begins to count anew.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from zfabric.core.controller.access import UNLIMITED, Grant, Limits
from zfabric.errors import RateLimitedError
from zfabric.limits import GROUPS_IDLE_MAX, RETRY_AFTER_S

if TYPE_CHECKING:
    from zfabric.core.controller.peers import Request

_SECOND_NS: Final = 1_000_000_000
_MINUTE_S: Final = 60


class Bucket:
    """How much of something may be had in a time: a rate, and as much at once as comes in `span_s`.

    The generic cell rate algorithm (ITU-T I.371): all that is kept is when the bucket is full again. Each operation is O(1).

    Args:
        rate: How many a second, above 0.
        span_s: Seconds after which an empty bucket is full. One piece at least may be had at once.
        full_ns: When it is full.
    """

    __slots__ = ("_cost_ns", "_room_ns", "full_ns")

    def __init__(self, rate: float, span_s: int, full_ns: int = 0) -> None:
        self._cost_ns = max(1, math.ceil(_SECOND_NS / rate))
        self._room_ns = max(self._cost_ns, span_s * _SECOND_NS)
        self.full_ns = full_ns

    def wait_ns(self, now_ns: int) -> int:
        """After how long one piece may be had; 0 for now."""
        return max(0, self.full_ns + self._cost_ns - self._room_ns - now_ns)

    def take(self, count: int, now_ns: int) -> None:
        """Take so many pieces, there or not: what is taken in advance has to be waited for."""
        self.full_ns = max(self.full_ns, now_ns) + count * self._cost_ns


class Account:
    """What a group has, and had lately."""

    __slots__ = ("_requests", "_tokens", "limits", "live", "name")

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        #: Its attempts of which something is left.
        self.live: set[Request] = set()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.limits = UNLIMITED
        self.use(limits)

    def use(self, limits: Limits) -> None:
        """Other limits from now on. What was had under the former ones stays had."""
        if limits == self.limits:
            return
        self.limits = limits
        rate, tokens = limits.requests_per_second, limits.tokens_per_minute
        self._requests = _bucket(self._requests, rate, 1)
        self._tokens = _bucket(self._tokens, tokens / _MINUTE_S if tokens is not None else None, _MINUTE_S)

    def check(self, now_ns: int) -> None:
        """Raises: RateLimitedError, another request would be too much now."""
        limits = self.limits
        if limits.requests_in_flight is not None and len(self.live) >= limits.requests_in_flight:
            raise RateLimitedError(
                f"{self.name!r} has {len(self.live)} requests in flight, limit is {limits.requests_in_flight}",
                group=self.name,
                limit=limits.requests_in_flight,
                retry_after_ms=RETRY_AFTER_S * 1_000,
            )
        self._check(self._requests, now_ns, "requests a second", limits.requests_per_second)
        self._check(self._tokens, now_ns, "tokens a minute", limits.tokens_per_minute)

    def _check(self, bucket: Bucket | None, now_ns: int, of_what: str, limit: float | None) -> None:
        wait_ns = bucket.wait_ns(now_ns) if bucket is not None else 0
        if wait_ns:
            wait_ms = -(-wait_ns // 1_000_000)
            raise RateLimitedError(
                f"{self.name!r} has had its {limit:g} {of_what}, there is more in {wait_ms} ms",
                group=self.name,
                limit=limit,
                retry_after_ms=wait_ms,
            )

    def enter(self, request: Request, now_ns: int, *, again: bool) -> None:
        """A request is accepted, `again` for the next attempt of one that was lost."""
        self.live.add(request)
        if self._requests is not None and not again:
            self._requests.take(1, now_ns)

    def leave(self, request: Request, now_ns: int) -> None:
        """Nothing is left of a request. Safe to call twice."""
        if request not in self.live:
            return
        self.live.discard(request)
        if self._tokens is not None:
            self._tokens.take(max(0, request.units - request.resume_from), now_ns)

    def idle(self, now_ns: int) -> bool:
        """Whether it is as one that was never used."""
        buckets = (self._requests, self._tokens)
        return not self.live and all(bucket is None or bucket.full_ns <= now_ns for bucket in buckets)


class Quotas:
    """The accounts of all groups with limits: those of the keyring, and of former ones until they are idle."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, grant: Grant, now_ns: int) -> Account | None:
        """The account of a key's group; None where it has no limits."""
        if grant.limits is UNLIMITED or grant.limits == UNLIMITED:
            return None
        account = self._accounts.get(grant.group)
        if account is None:
            if len(self._accounts) >= GROUPS_IDLE_MAX:
                self._accounts = {name: it for name, it in self._accounts.items() if not it.idle(now_ns)}
            account = self._accounts[grant.group] = Account(grant.group, grant.limits)
        account.use(grant.limits)
        return account


def _bucket(former: Bucket | None, rate: float | None, span_s: int) -> Bucket | None:
    if rate is None:
        return None
    return Bucket(rate, span_s, former.full_ns if former is not None else 0)
