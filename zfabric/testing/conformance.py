"""What every backend owes its callers, asked of one that somebody wrote: one call, and a list of what is kept and broken.

A promise is asked as a client would ask it, through a real controller and worker in the caller's process. What a model does not
announce is not asked. Nothing here knows any engine, so what a model says is only compared with what it says at another time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from zfabric.testing import promises
from zfabric.testing.asking import Asked, BrokenPromise, NotAsked, Promise
from zfabric.testing.serving import serving

if TYPE_CHECKING:
    from zfabric.client.aio import AsyncClient
    from zfabric.worker.base import BaseModelWorker

#: How long one promise may take to be asked, in seconds: an engine on a slow machine makes a few dozen tokens in that.
_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one promise.

    Attributes:
        promise: What is owed, in one sentence.
        kept: Whether it was kept; None where it was not asked.
        why: What was seen instead, or why it was not asked.
    """

    promise: str
    kept: bool | None
    why: str = ""


@dataclass(slots=True)
class Report:
    """All that was found.

    Attributes:
        model: Of which model.
        findings: One for each promise.
    """

    model: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> list[Finding]:
        """Promises that were not kept."""
        return [finding for finding in self.findings if finding.kept is False]

    def __str__(self) -> str:
        marks = {True: "kept", False: "BROKEN", None: "not asked"}
        lines = [f"{marks[it.kept]:>9}  {it.promise}" + (f": {it.why}" if it.why else "") for it in self.findings]
        return "\n".join([f"model {self.model!r}:", *lines])


async def conformance(
    *backends: BaseModelWorker,
    prompt: str = "The quick brown fox",
    limit_s: float = _LIMIT_S,
    check: bool = True,
    **settings: Any,
) -> list[Report]:
    """Ask backends for all that they owe.

    .. code-block:: python

        async def test_my_backend():
            await zfabric.testing.conformance(MyBackend())

    Args:
        *backends: Loaded here, and closed at the end.
        prompt: A text that the models can go on from, for some dozen tokens.
        limit_s: Seconds that one promise may take.
        check: Whether to raise for what is broken.
        **settings: Of `WorkerConfig`, such as `slots`.

    Returns:
        A report for each model. `print` shows it as lines.

    Raises:
        AssertionError: A promise is broken; the report is its message.
        Exception: Whatever made loading a backend impossible.
    """
    async with serving(*backends, **settings) as client:
        reports = [
            await examine(client, status.name, prompt=prompt, limit_s=limit_s) for status in await client.models()
        ]
    if check and any(report.broken for report in reports):
        raise AssertionError("\n\n".join(str(report) for report in reports if report.broken))
    return reports


async def examine(
    client: AsyncClient, model: str, *, prompt: str = "The quick brown fox", limit_s: float = _LIMIT_S
) -> Report:
    """As `conformance`, of a model that a running fabric serves.

    .. code-block:: python

        async with AsyncClient() as client:
            print(await zfabric.testing.examine(client, "smollm2"))
    """
    asked = Asked(client, await client.model_details(model), prompt)
    return Report(model, [await _ask(promise, asked, limit_s) for promise in promises.ALL])


async def _ask(promise: Promise, asked: Asked, limit_s: float) -> Finding:
    lacking = promise.lacks(asked.status)
    if lacking:
        return Finding(promise.sentence, None, f"the model announces no {lacking}")
    try:
        async with asyncio.timeout(limit_s):
            await promise.ask(asked)
    except BrokenPromise as error:
        return Finding(promise.sentence, False, str(error))
    except NotAsked as error:
        return Finding(promise.sentence, None, str(error))
    except TimeoutError:
        return Finding(promise.sentence, False, f"nothing was seen within {limit_s:g} s")
    except Exception as error:  # noqa: BLE001 — whatever a call raises is what was seen instead
        return Finding(promise.sentence, False, f"{type(error).__name__}: {error}")
    return Finding(promise.sentence, True)
