"""Several controllers: endpoints in a list, and names that have several addresses."""

from __future__ import annotations

import random
from collections.abc import Sequence

from zfabric.errors import ConfigurationError
from zfabric.transport.addresses import dialed_hosts
from zfabric.transport.endpoints import Endpoint, parse_endpoint, tcp_endpoint


async def controllers_of(endpoint: Endpoint) -> list[str]:
    """The endpoints of the controllers that a name stands for, of which each has an address of its own.

    A host with one address of each family is one controller, by its name. Else the family that has more addresses counts.

    Raises:
        OSError: The name is not known, or nobody can be asked now.
    """
    hosts = _of_one_family(await dialed_hosts(endpoint))
    return [tcp_endpoint(host, endpoint.port) for host in hosts] if len(hosts) > 1 else [endpoint.text]


def _of_one_family(hosts: Sequence[str]) -> list[str]:
    newer = [host for host in hosts if ":" in host]
    older = [host for host in hosts if ":" not in host]
    return newer if len(newer) > len(older) else older


def unknown(error: OSError) -> str:
    """In words, why nobody knows whom to dial."""
    return f"the {'file cannot be read' if error.filename else 'name cannot be looked up'}: {error}"


class Targets:
    """Whom a client dials next.

    Args:
        endpoints: Its controllers'.
        rng: Chance: clients begin at any of them, so that each has its part.

    Attributes:
        several: Whether there is more than one controller, as far as is known.
    """

    def __init__(self, endpoints: Sequence[Endpoint], rng: random.Random) -> None:
        self._endpoints = list(endpoints)
        self.several = len(self._endpoints) > 1
        self._rng = rng
        if self.several:
            rng.shuffle(self._endpoints)
        #: By address, when it was tried last, as a number that grows.
        self._tried: dict[str, int] = {}
        self._tries = 0

    async def round(self) -> list[Endpoint]:
        """All addresses. Of several controllers, whose was tried last comes last.

        Raises:
            OSError: There is none, since a name is not known, or nobody can be asked now, or a file cannot be read.
            ConfigurationError: There is none, since a file holds none.
        """
        found: list[Endpoint] = []
        trouble: OSError | ConfigurationError | None = None
        several = len(self._endpoints) > 1
        for given in self._endpoints:
            try:
                endpoint = given.now()
                if endpoint.literal:
                    found.append(endpoint)
                    continue
                hosts = await dialed_hosts(endpoint)
            except (OSError, ConfigurationError) as error:
                trouble = error
                continue
            if endpoint.named and len(_of_one_family(hosts)) > 1:
                several = True
                self._rng.shuffle(hosts)
            found += [parse_endpoint(tcp_endpoint(host, endpoint.port)) for host in hosts]
        if not found and trouble is not None:
            raise trouble
        self.several = several
        if several:
            found.sort(key=lambda endpoint: self._tried.get(endpoint.text, 0))
            self._tried = {one.text: self._tried[one.text] for one in found if one.text in self._tried}
        return found

    def trying(self, endpoint: Endpoint) -> None:
        """An address is about to be tried."""
        self._tries += 1
        self._tried[endpoint.text] = self._tries
