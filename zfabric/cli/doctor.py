"""zfabric doctor: looks at this host, at the way to the controller, and at the fabric, and says what to do."""

from __future__ import annotations

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from zfabric.cli.app import hint_of
from zfabric.cli.check import check_file
from zfabric.cli.findings import Finding, Level, has_errors, show_findings
from zfabric.cli.options import Config, Endpoint, Json, Timeout, Transport
from zfabric.cli.settings import config_file
from zfabric.client.sync import Client
from zfabric.errors import ConfigurationError, FabricError
from zfabric.limits import CLOCK_DIFFERENCE_S_MAX, FILE_DESCRIPTORS_MIN, LISTED_MAX, PING_TIMEOUT_S
from zfabric.transport.context import file_limit
from zfabric.transport.curve import CONTROLLER_KEY_VARIABLE, KEY_VARIABLE, default_credentials
from zfabric.transport.endpoints import Endpoint as Parsed
from zfabric.transport.endpoints import default_endpoint, parse_endpoints
from zfabric.transport.ipc import check_ipc_owner
from zfabric.version import __version__
from zfabric.wire.status import FabricStatus, WorkerStatus

#: What Linux has free for new work, in kB.
_MEMORY: Final = Path("/proc/meminfo")


def doctor(
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> int:
    """Look for what is not as it should be, here and at the controller, and say what to do about each.

    The exit code is 0 if nothing keeps the fabric from working, and 1 if something does.

    **Examples**

    `zfabric doctor` · `zfabric doctor --endpoint tcp://gpu-1:9000 --json`
    """
    wait_s = PING_TIMEOUT_S if timeout is None else timeout
    findings = [*_settings(config), *_host(), *_keys()]
    reachable = list(_way(endpoint))
    findings += reachable
    if not has_errors(reachable):
        findings += _fabric(endpoint, transport, wait_s)
    show_findings(findings, as_json=as_json)
    return 1 if has_errors(findings) else 0


# ── here ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(config: Path | None) -> Iterator[Finding]:
    """The file that programs of this user read."""
    try:
        path = config or config_file([], "client")
    except ConfigurationError as error:
        yield Finding("error", "settings", error.message, "name another with --config or $ZFABRIC_CONFIG")
        return
    if path is None:
        yield Finding("fine", "settings", "there is no settings file: all are defaults")
        return
    wrong = [finding for finding in check_file(path) if finding.level != "fine"]
    yield from wrong or [Finding("fine", "settings", f"{path} can be read by all programs")]


def _host() -> Iterator[Finding]:
    """What a daemon of this user would find here."""
    limit = file_limit()
    if limit is not None and limit < FILE_DESCRIPTORS_MIN:
        advice = "raise it with ulimit -n, or LimitNOFILE= of a systemd unit; each peer of a controller costs one"
        yield Finding("warning", "files", f"{limit} files may be open, {FILE_DESCRIPTORS_MIN} are wanted", advice)
    else:
        yield Finding("fine", "files", f"{limit} files may be open")
    free = _free_bytes()
    if free is not None:
        yield Finding("fine", "memory", f"{free / 2**30:.1f} GiB are free")
    if importlib.util.find_spec("uvloop") is None:
        yield Finding(
            "warning",
            "uvloop",
            "it is not installed: daemons use Python's own loop, which is slower",
            "pip install 'zfabric[uvloop]'",
        )
    else:
        yield Finding("fine", "uvloop", "it is installed")


def _free_bytes() -> int | None:
    """Memory that new work may take; None where the system does not tell."""
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1_024 if found else None


def _keys() -> Iterator[Finding]:
    """The keys that this user's programs show."""
    try:
        credentials = default_credentials()
    except ConfigurationError as error:
        advice = (
            "chmod 0600 the secret key file"
            if "0600" in error.message
            else f"see ${KEY_VARIABLE} and ${CONTROLLER_KEY_VARIABLE}"
        )
        yield Finding("error", "keys", error.message, advice)
        return
    told = (
        "none are set: a controller with keys refuses this user"
        if credentials is None
        else "both can be read, and the secret is this user's alone"
    )
    yield Finding("fine", "keys", told)


# ── the way ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _way(endpoint: str | None) -> Iterator[Finding]:
    """The endpoints, and where one is a socket in a directory, whose that is."""
    try:
        parsed = parse_endpoints(endpoint or default_endpoint())
    except ConfigurationError as error:
        yield Finding("error", "endpoint", error.message)
        return
    for one in parsed:
        yield _way_to(one)


def _way_to(parsed: Parsed) -> Finding:
    given = parsed.text
    try:
        held = parsed.now()
    except OSError as error:
        return Finding("error", "endpoint", f"{given} cannot be read: {error}", "name another --endpoint")
    except ConfigurationError as error:
        return Finding("error", "endpoint", f"{given}: {error.message}")
    if not held.is_ipc:
        return Finding("fine", "endpoint", given if held is parsed else f"{given} holds {held.text}")
    path = Path(held.path)
    try:
        there = check_ipc_owner(path)
    except ConfigurationError as error:
        advice = "the directory has to be the controller's user's, with mode 0700"
        return Finding("error", "endpoint", error.message, advice)
    if not there:
        advice = "start a controller there, or name another --endpoint"
        return Finding("error", "endpoint", f"there is no socket at {given}", advice)
    told = f"{given}, in a directory of uid {path.parent.stat().st_uid}, this user is {os.geteuid()}"
    return Finding("fine", "endpoint", told)


# ── the fabric ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _fabric(endpoint: str | None, transport: str | None, wait_s: float) -> Iterator[Finding]:
    try:
        with Client(endpoint, transport=transport, connect_timeout_ms=max(1, int(wait_s * 1_000))) as client:
            began, asked = time.perf_counter(), time.time()
            status = client.status(timeout=wait_s)
            took_s = time.perf_counter() - began
            yield Finding("fine", "controller", f"{client.endpoint} answers in {took_s * 1_000:.1f} ms")
            yield from _controller(status, asked + took_s / 2)
            yield from _workers(client.workers(timeout=wait_s))
            yield from _versions(client, status, wait_s)
            yield from _waits(client, wait_s)
            yield from _memory(client, wait_s)
    except FabricError as error:
        yield Finding("error", "controller", f"error {error.code}: {error.message}", hint_of(error))


def _controller(status: FabricStatus, now_s: float) -> Iterator[Finding]:
    if status.draining:
        yield Finding("warning", "controller", "it drains, and takes no new requests", "start the one that follows it")
    if status.recovering:
        yield Finding(
            "warning", "controller", "it is new, and waits for workers and clients to come back", "wait some seconds"
        )
    if status.policy_failures:
        yield Finding(
            "warning",
            "policy",
            f"{status.policy!r} failed {status.policy_failures} times",
            "its log has the reason at policy_failed",
        )
    for reader in status.slow_readers:
        yield Finding(
            "warning",
            reader.name,
            f"{reader.buffered_bytes:,} bytes wait for it to read them",
            "see whether its process is busy or stopped",
        )
    if status.unix_s:
        difference_s = status.unix_s - now_s
        if abs(difference_s) > CLOCK_DIFFERENCE_S_MAX:
            yield Finding(
                "warning",
                "clock",
                f"the controller's is {difference_s:+.1f} s from this host's",
                "have both follow a time server: logs are compared by them",
            )
        else:
            yield Finding("fine", "clock", f"the controller's is {difference_s * 1_000:+.0f} ms from this host's")


def _workers(workers: list[WorkerStatus]) -> Iterator[Finding]:
    if not workers:
        yield Finding("error", "workers", "none is registered", "start one: zfabric-worker")
    for worker in workers:
        if worker.state == "stalled":
            yield Finding(
                "error",
                f"worker {worker.name}",
                "an engine of it has work and does not move",
                "see its log; restart it if the engine hangs",
            )
        elif worker.drained_by:
            yield Finding(
                "warning",
                f"worker {worker.name}",
                f"operator {worker.drained_by!r} has it drain",
                f"zfabric undrain {worker.name}",
            )
        elif worker.state != "ready":
            yield Finding(
                "warning", f"worker {worker.name}", f"it is {worker.state}", "it leaves when its requests have ended"
            )
        elif not worker.slots:
            yield Finding("warning", f"worker {worker.name}", "it offers no slots", "see --slots of zfabric-worker")
    states = Counter(worker.state for worker in workers)
    if states["ready"]:
        yield Finding("fine", "workers", ", ".join(f"{count} {state}" for state, count in sorted(states.items())))


def _versions(client: Client, status: FabricStatus, wait_s: float) -> Iterator[Finding]:
    """Of all peers that this key may see. Minor versions are served side by side, but not for ever."""
    told: dict[str, list[str]] = {}
    told.setdefault(_version(status.version, status.minor), []).append("the controller")
    for worker in client.workers(timeout=wait_s):
        told.setdefault(_version(worker.build, worker.minor), []).append(f"worker {worker.name}")
    for peer in client.clients(limit=LISTED_MAX, timeout=wait_s).rows:
        told.setdefault(_version(peer.build, peer.minor), []).append(f"client {peer.client}")
    if len(told) == 1:
        yield Finding("fine", "versions", f"all peers have {next(iter(told))}, this program is {__version__}")
        return
    for version, peers in sorted(told.items()):
        shown = ", ".join(peers[:3]) + (f" and {len(peers) - 3} more" if len(peers) > 3 else "")
        yield Finding(
            "warning", "versions", f"{version}: {shown}", "upgrade those that are older; answers go on meanwhile"
        )


def _version(build: str, minor: int) -> str:
    return f"{build or 'no name of a version'} (protocol 2.{minor})"


def _waits(client: Client, wait_s: float) -> Iterator[Finding]:
    advice = {
        "paused": "zfabric resume",
        "no_worker": "start a worker of it",
        "capability": "start a worker that can do it",
        "not_taking": "zfabric workers says what they are at",
        "slots": "start another worker, if it lasts",
        "loading": "raise adapters_per_host, if it lasts",
    }
    found = client.queue(limit=LISTED_MAX, timeout=wait_s)
    for row in found.rows:
        level = _level_of(row.reason)
        told = f"{row.waiting} wait for {row.operation}, for {row.longest_wait_s:.0f} s: {row.why}"
        yield Finding(level, f"model {row.model}", told, advice.get(row.reason, ""))
    if not found.rows:
        yield Finding("fine", "queues", "nothing waits")


def _level_of(reason: str) -> Level:
    return "fine" if reason in ("slots", "") else "warning"


def _memory(client: Client, wait_s: float) -> Iterator[Finding]:
    """Whether the controller may keep more than there is; only an operator may know its settings."""
    try:
        settings = {row.name: row.value for row in client.settings(timeout=wait_s)}
    except FabricError:
        yield Finding(
            "fine", "operator", "this key is no operator's: settings and others' requests are not shown to it"
        )
        return
    limit, free = settings["queue_bytes_max"], _free_bytes()
    if isinstance(limit, int) and free is not None and limit > free:
        yield Finding(
            "warning",
            "memory",
            f"queues may hold {limit / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on this host",
            "if the controller runs here, zfabric config set queue_bytes_max",
        )
