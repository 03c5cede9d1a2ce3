"""Who may do what: the grant of a key, and the checks that a broker makes against it.

A grant is looked up once, when a session opens. The session is the connection, and the connection's key cannot change, so
nobody can act for another peer later.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from zfabric.errors import PermissionDeniedError, TooLargeError
from zfabric.limits import PRIORITY_MAX


class Role(StrEnum):
    """What a peer is to the fabric.

    An operator is a client that may also steer it, see what is others', and call workers. An observer sees all that an operator
    sees of requests, clients, workers and queues, submits nothing and steers nothing.
    """

    CLIENT = "client"
    WORKER = "worker"
    OPERATOR = "operator"
    OBSERVER = "observer"


@dataclass(frozen=True, slots=True)
class Limits:
    """What all keys of a group may have together; None is no limit beyond the broker's own.

    Attributes:
        requests_in_flight: From their acceptance until their worker has stopped.
        requests_per_second: Accepted ones, averaged; as many at once as in a second.
        tokens_per_minute: Units of answers (`zfabric.core.controller.quotas`), averaged; as many at once as in a minute.
    """

    requests_in_flight: int | None = None
    requests_per_second: float | None = None
    tokens_per_minute: float | None = None


#: No limits.
UNLIMITED: Final = Limits()


@dataclass(frozen=True, slots=True)
class Grant:
    """What one key allows.

    Attributes:
        name: Of the key's holder, for messages.
        roles: What it may be.
        models: Patterns, as of a shell: a client may ask these models only, a worker may serve these only.
        workers: Patterns of the names that a worker may take.
        group: Whose limits and whose turns in queues it shares; "" where each client has turns of its own, and no limits.
        limits: Of the group.
        prompt_bytes: What the body of a request may hold, None for the most that anybody may send.
        priorities: The least and the greatest that its requests may have.
    """

    name: str
    roles: frozenset[Role]
    models: tuple[str, ...] = ("*",)
    workers: tuple[str, ...] = ("*",)
    group: str = ""
    limits: Limits = UNLIMITED
    prompt_bytes: int | None = None
    priorities: tuple[int, int] = (-PRIORITY_MAX, PRIORITY_MAX)

    @property
    def is_client(self) -> bool:
        """Whether it may submit requests."""
        return Role.CLIENT in self.roles or Role.OPERATOR in self.roles

    @property
    def is_operator(self) -> bool:
        """Whether it may operate the fabric."""
        return Role.OPERATOR in self.roles

    @property
    def sees_all(self) -> bool:
        """Whether it is shown what is others'."""
        return Role.OPERATOR in self.roles or Role.OBSERVER in self.roles

    def check_asks(self) -> None:
        """Raises: PermissionDeniedError, it may not have a client's session."""
        if not self.is_client and not self.sees_all:
            raise PermissionDeniedError(f"key {self.name!r} is not a client's", key=self.name)

    def check_client(self) -> None:
        """Raises: PermissionDeniedError, it may not submit requests."""
        if not self.is_client:
            raise PermissionDeniedError(f"key {self.name!r} may submit no requests", key=self.name)

    def check_operator(self, what: str) -> None:
        """Raises: PermissionDeniedError, it may not operate the fabric."""
        if not self.is_operator:
            raise PermissionDeniedError(f"{what} needs an operator's key, key {self.name!r} is none", key=self.name)

    def check_worker(self, worker: str) -> None:
        """Raises: PermissionDeniedError, it may not be a worker, or not one of this name."""
        if Role.WORKER not in self.roles:
            raise PermissionDeniedError(f"key {self.name!r} is not a worker's", key=self.name)
        if not _matches(worker, self.workers):
            raise PermissionDeniedError(f"key {self.name!r} may not name a worker {worker!r}", key=self.name)

    def allows_model(self, model: str) -> bool:
        """Whether it has anything to do with this model."""
        return _matches(model, self.models)

    def check_model(self, model: str) -> None:
        """Raises: PermissionDeniedError, it has nothing to do with this model."""
        if not self.allows_model(model):
            raise PermissionDeniedError(
                f"key {self.name!r} has no access to model {model!r}", key=self.name, model=model
            )

    def check_request(self, priority: int, size: int) -> None:
        """Raises: PermissionDeniedError, TooLargeError: It may not submit a request of this priority, or whose body holds so many
        bytes."""
        self.check_client()
        least, greatest = self.priorities
        if not least <= priority <= greatest:
            raise PermissionDeniedError(
                f"key {self.name!r} has no priority {priority}, it may have {least} … {greatest}",
                key=self.name,
                priority=priority,
            )
        if self.prompt_bytes is not None and size > self.prompt_bytes:
            raise TooLargeError(
                f"the request holds {size} bytes, key {self.name!r} may send {self.prompt_bytes}",
                size=size,
                limit=self.prompt_bytes,
            )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # Most grants are of everything: asked so, no pattern is looked at.
    return "*" in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


#: Everybody's grant on a fabric without keys.
EVERYBODY: Final = Grant("everybody", frozenset(Role))
