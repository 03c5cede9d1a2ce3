"""zfabric-controller: flags → ControllerConfig → Controller."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

from zfabric import limits
from zfabric.cli.app import make_app, run_app
from zfabric.cli.daemon import on_hangup, on_signals, ready, run
from zfabric.cli.logs import LogFormat, LogLevel, events, make_logger
from zfabric.cli.metrics import metrics_at
from zfabric.cli.settings import CONFIG_VARIABLE
from zfabric.cli.traces import traces_to
from zfabric.controller.config import CellConfig, ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.dispatch import POLICIES, register_policy
from zfabric.core.controller.spans import AttemptSpan
from zfabric.errors import ConfigurationError
from zfabric.fleet.config import load
from zfabric.recording.config import recording_of
from zfabric.transport.context import keep_memory, own_the_process
from zfabric.transport.curve import Credentials
from zfabric.transport.endpoints import default_endpoint
from zfabric.worker.config import default_name

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

HELP = """Broker between clients and workers: one ROUTER socket, a registry of workers, and a queue per model.

**Examples**

On one host nothing has to be given: `zfabric-controller`

For other hosts: `zfabric-controller --endpoint tcp://0.0.0.0:9000 --public --endpoint ipc:///run/zfabric/c.sock`

Another policy: `zfabric-controller --policy power_of_two`, or your own: `--policy mypackage.policies:cheapest`

On a core of its own, for the lowest latency: `taskset -c 3 zfabric-controller --spin-us 200`

With keys: `zfabric-controller --endpoint tcp://0.0.0.0:9000 --public --key c.key_secret --keyring keyring.toml`

As one worker of another controller, with all that its own workers serve: `zfabric-controller --endpoint tcp://10.0.2.1:9000
--public --parent tcp://10.0.0.1:9000 --cell east`

Settings come from flags, then ZFABRIC_CONTROLLER_… variables, then the [controller] table of a TOML file.
SIGTERM drains: nothing new is taken, what runs may finish within --drain-ms, and the exit code is 0.
SIGHUP has the fleet's rules and the keyring read anew; the latter also happens when it changes.
"""


def build(arguments: list[str]) -> cyclopts.App:
    """The command's parser."""
    app = make_app("zfabric-controller", HELP, "controller", arguments)

    @app.default
    def controller(
        *,
        endpoint: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=False)] = (),
        public: bool = False,
        key: Path | None = None,
        keyring: Path | None = None,
        fleet: Path | None = None,
        parent: str | None = None,
        cell: str | None = None,
        parent_key: Path | None = None,
        parent_controller_key: Path | None = None,
        other_users: bool = False,
        policy: str = "shortest_queue",
        beat_ms: int = limits.BEAT_MS,
        lease_ms: int = limits.LEASE_MS,
        stall_ms: int = limits.STALL_MS,
        recovery_ms: int = limits.RECOVERY_MS,
        claim_ms: int = limits.CLAIM_MS,
        queue_depth_max: int = limits.QUEUE_DEPTH_MAX,
        queue_bytes_max: int = limits.QUEUE_BYTES_MAX,
        client_requests_max: int = limits.CLIENT_REQUESTS_MAX,
        circuit_failures: int = limits.CIRCUIT_FAILURES,
        imbalance_requests: int = limits.IMBALANCE_REQUESTS,
        imbalance_ratio: float = limits.IMBALANCE_RATIO,
        adapters_per_host: int = limits.ADAPTERS_PER_HOST,
        adapter_idle_ms: int = limits.ADAPTER_IDLE_MS,
        adapter_spread: int = limits.ADAPTER_SPREAD,
        transport: str | None = None,
        spin_us: int | None = None,
        drain_ms: int = limits.DRAIN_MS,
        metrics: str | None = None,
        traces: str | None = None,
        record: Path | None = None,
        record_bytes_max: int = limits.RECORD_BYTES_MAX,
        record_ms_max: int = limits.RECORD_MS_MAX,
        log_level: LogLevel = "info",
        log_format: LogFormat = "auto",
        uvloop: bool = True,
        config: Annotated[Path | None, cyclopts.Parameter(env_var=CONFIG_VARIABLE)] = None,
    ) -> int:
        """Run a controller.

        Args:
            endpoint: Where to listen; repeat for several. ipc://PATH or tcp://HOST:PORT. By default $ZFABRIC_ENDPOINT,
                else a socket of the user's own.
            public: Allow endpoints that other hosts can reach.
            key: The controller's secret key file, made by `zfabric keys make`. With it everything is encrypted.
            keyring: TOML file of the keys that may connect, and what each may do; goes with --key.
            fleet: TOML file of a fleet, whose rules say how many workers models should have.
            parent: The endpoint of another controller, at which this one is a worker that serves the sum of its models: a cell.
            cell: The name of that worker; the host's name and the process's number by default.
            parent_key: The secret key file by which the cell proves itself to a parent with keys, of a worker's role there.
            parent_controller_key: The parent's public key file; goes with --parent-key.
            other_users: Take ipc connections of other users as well; their clients trust only a controller that root runs.
            policy: How a worker is chosen: a name, or module:function.
            beat_ms: Workers report so often.
            lease_ms: A worker silent for so long is removed.
            stall_ms: An engine that makes no progress for so long loses its requests.
            recovery_ms: How long after the start running streams may be claimed.
            claim_ms: How long requests outlive a lost connection.
            queue_depth_max: Waiting requests per model.
            queue_bytes_max: Bytes of all waiting requests.
            client_requests_max: Requests in flight per client.
            circuit_failures: Failures in a row after which a worker gets no requests for the model for a while; 0 for never.
            imbalance_requests: With sticky_least_loaded, a key leaves its worker when that has over so many requests more than
                the least loaded one, and over --imbalance-ratio times its load.
            imbalance_ratio: See --imbalance-requests.
            adapters_per_host: Adapters that are loaded on demand at one worker at once, of those that it offers; 0 for none.
            adapter_idle_ms: An adapter that was loaded on demand and that no request has used for so long is unloaded.
            adapter_spread: Requests, running and waiting, for each worker that has an adapter: more of them want one more.
            transport: The driver of the sockets, loop or libzmq; $ZFABRIC_TRANSPORT, else loop, by default.
            spin_us: Busy polling, where a core is given to it: look for messages for so many microseconds after work before
                sleeping; $ZFABRIC_SPIN_US, else not at all, by default.
            drain_ms: How long a drain waits for running requests.
            metrics: Serve OpenMetrics at this PORT (of loopback) or HOST:PORT, under /metrics.
            traces: Export traces by OTLP over HTTP to this collector, as http://localhost:4318, or to the one that
                OTEL_EXPORTER_OTLP_… variables name (env).
            record: Record what happens to peers and requests to this file, for `zfabric replay`.
            record_bytes_max: What the recording takes on disk at most.
            record_ms_max: How far the recording goes back at most.
            log_level: debug, info, warning or error.
            log_format: console, json, or auto (by terminal).
            uvloop: Use uvloop where it is installed.
            config: TOML file.
        """
        del config
        broker = BrokerConfig(
            policy=_policy(policy),
            beat_ms=beat_ms,
            lease_ms=lease_ms,
            stall_ms=stall_ms,
            recovery_ms=recovery_ms,
            claim_ms=claim_ms,
            queue_depth_max=queue_depth_max,
            queue_bytes_max=queue_bytes_max,
            client_requests_max=client_requests_max,
            circuit_failures=circuit_failures,
            imbalance_requests=imbalance_requests,
            imbalance_ratio=imbalance_ratio,
            adapters_per_host=adapters_per_host,
            adapter_idle_ms=adapter_idle_ms,
            adapter_spread=adapter_spread,
        )
        settings = ControllerConfig(
            endpoints=endpoint or (default_endpoint(),),
            public=public,
            key=key,
            keyring=keyring,
            other_users=other_users,
            transport=transport,
            spin_us=spin_us,
            drain_ms=drain_ms,
            record=recording_of(record, record_bytes_max, record_ms_max),
            broker=broker,
            cell=cell_of(parent, cell, parent_key, parent_controller_key),
        )
        if fleet is not None:
            load(fleet)
        return run(serve(settings, log_level, log_format, metrics, traces, fleet), use_uvloop=uvloop)

    return app


def cell_of(parent: str | None, name: str | None, key: Path | None, controller_key: Path | None) -> CellConfig | None:
    """Whose cell a controller is, None for nobody's.

    Raises:
        ConfigurationError: There is no parent, and something is said of it; or what is said cannot work.
    """
    given = {"cell": name, "parent_key": key, "parent_controller_key": controller_key}
    if parent is None:
        for flag, value in given.items():
            if value is not None:
                raise ConfigurationError(f"{flag} is {str(value)!r}, and there is no parent", parameter=flag)
        return None
    if (key is None) != (controller_key is None):
        raise ConfigurationError("parent_key and parent_controller_key go together, one of them is missing")
    credentials = None if key is None or controller_key is None else Credentials.load(key, controller_key)
    return CellConfig(parent=parent, name=default_name() if name is None else name, credentials=credentials)


def _policy(name: str) -> str:
    """The name of a policy; one of the form module:function is imported and registered.

    Raises:
        ConfigurationError: No such policy.
    """
    if name in POLICIES:
        return name
    module, separator, function = name.partition(":")
    if not separator:
        raise ConfigurationError(f"policy {name!r} is not one of {', '.join(sorted(POLICIES))}, nor module:function")
    try:
        register_policy(name, getattr(importlib.import_module(module), function))
    except ConfigurationError:
        raise
    except Exception as error:  # an import runs whatever the module holds
        raise ConfigurationError(f"policy {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return name


async def serve(
    settings: ControllerConfig,
    level: LogLevel,
    form: LogFormat,
    metrics: str | None = None,
    traces: str | None = None,
    fleet: Path | None = None,
) -> int:
    """Run until drained."""
    own_the_process()
    keep_memory()
    log = make_logger("controller", level, form)
    stopped = asyncio.Event()
    told = events(log)
    async with (
        traces_to(traces, "zfabric-controller", told) as provider,
        Controller(settings, log=told, traces=_sink(provider)) as controller,
    ):

        async def drain() -> None:
            whole = await controller.drain()
            log.info("drained", all_ended=whole)
            stopped.set()

        def read_rules() -> None:
            if fleet is not None:
                controller.set_rules(load(fleet).rules)

        async def reload() -> None:
            controller.reload_keys()
            try:
                read_rules()
            except ConfigurationError as error:
                told("fleet_kept", error=error.message)

        read_rules()

        on_signals(drain)
        on_hangup(reload)
        with metrics_at(metrics, "controller", controller) as url:
            ready(endpoint=",".join(controller.endpoints), **url)
            await stopped.wait()
    return 0


def _sink(provider: TracerProvider | None) -> Callable[[list[AttemptSpan]], None] | None:
    if provider is None:
        return None
    from zfabric.tracing.controller import ControllerTraces

    return ControllerTraces(provider)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_app(build, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
