"""zfabric-worker: flags → WorkerConfig and backends → WorkerService."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import cyclopts

from zfabric import limits
from zfabric.backends.registry import BACKENDS, backend_class
from zfabric.cli.app import make_app, run_app
from zfabric.cli.daemon import leave, on_hangup, on_signals, ready, run
from zfabric.cli.logs import LogFormat, LogLevel, events, make_logger
from zfabric.cli.metrics import metrics_at
from zfabric.cli.settings import CONFIG_VARIABLE, config_file, read_section
from zfabric.cli.traces import traces_to
from zfabric.errors import ConfigurationError
from zfabric.recording.config import recording_of
from zfabric.transport.curve import credentials_of
from zfabric.transport.endpoints import default_endpoint
from zfabric.wire.messages import ModelInfo
from zfabric.worker.base import BaseModelWorker
from zfabric.worker.config import WorkerConfig, default_name
from zfabric.worker.service import WorkerService
from zfabric.worker.traces import Traces

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

#: Between the descriptions of two backends of one process.
AND: Final = "--and"
#: What brings the modules that a backend needs.
_EXTRAS: Final = {"hf-api": "zfabric[hf-api]", "transformers": "zfabric[transformers]", "vllm": "zfabric[vllm]"}

HELP = f"""Serve models on the fabric. Backends: {", ".join(sorted(BACKENDS))}, or your own as package.module:Class.

**Examples**

`zfabric-worker --backend echo`

`zfabric-worker --backend transformers --model ./SmolLM2-135M-Instruct --model-names smollm2 --model-names chat`

`zfabric-worker --backend transformers --model ./SmolLM2-135M-Instruct --quantization int8 --kv-cache-dtype 8bit`

`zfabric-worker --backend hf-api --models models.toml`

`zfabric-worker --backend vllm --model ./Llama-3.1-8B-Instruct --tensor-parallel-size 2` (`--vllm-help` lists what vLLM takes)

Several models in one process, each after `--and` with a backend and options of its own:
`zfabric-worker --backend transformers --model ./chat --and --backend transformers --model ./embedder`

`zfabric-worker --backend mypackage.backend:MyWorker --endpoint tcp://controller:9000`

`zfabric-worker --backend NAME --help` lists the options of that backend as well. Settings come from flags, then
ZFABRIC_WORKER_… variables, then the [worker] table of a TOML file. The worker dials out, waits for a controller that is
late, and reconnects for ever. SIGTERM drains: what runs may finish within --drain-ms, the rest is handed back. SIGHUP has
backends read their own files anew.
"""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of the process, whatever its backends.

    Attributes:
        backend: Name of a backend, or package.module:Class.
        endpoint: The controller's endpoint, or those of several with commas between them; $ZFABRIC_ENDPOINT, else this user's own
            socket, by default.
        name: Unique name of this worker; host-pid by default.
        slots: Concurrent requests; the backend's own number by default.
        speed: Relative speed for lottery and shortest_queue.
        stream_interval: Tokens gathered into one delta after the first.
        beats: Send beats. --no-beats registers a static worker, which is never removed for silence.
        transport: The driver of the socket, loop or libzmq; $ZFABRIC_TRANSPORT, else loop, by default.
        spin_us: Busy polling, where a core is given to it: look for messages for so many microseconds after work before sleeping;
            $ZFABRIC_SPIN_US, else not at all, by default. Not for an engine that computes in this process.
        drain_ms: How long a drain lets running requests finish.
        close_ms: How long after that an engine may take to end, or a model that is still loading to finish.
        metrics: Serve OpenMetrics at this PORT (of loopback) or HOST:PORT, under /metrics.
        traces: Export traces by OTLP over HTTP to this collector, as http://localhost:4318, or to the one that
            OTEL_EXPORTER_OTLP_… variables name (env).
        key: This worker's secret key file, for a controller with keys; $ZFABRIC_KEY by default.
        controller_key: The controller's public key file; $ZFABRIC_CONTROLLER_KEY by default.
        record: Record what happens to requests here to this file, for `zfabric replay`.
        record_bytes_max: What the recording takes on disk at most.
        record_ms_max: How far the recording goes back at most.
        log_level: debug, info, warning or error.
        log_format: console, json, or auto (by terminal).
        uvloop: Use uvloop where it is installed.
        config: TOML file.
    """

    backend: str = "echo"
    endpoint: str = field(default_factory=default_endpoint)
    name: str = field(default_factory=default_name)
    slots: int | None = None
    speed: float = 1.0
    stream_interval: int = 1
    beats: bool = True
    transport: str | None = None
    spin_us: int | None = None
    drain_ms: int = limits.DRAIN_MS
    close_ms: int = 10_000
    metrics: str | None = None
    traces: str | None = None
    key: Path | None = None
    controller_key: Path | None = None
    record: Path | None = None
    record_bytes_max: int = limits.RECORD_BYTES_MAX
    record_ms_max: int = limits.RECORD_MS_MAX
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    uvloop: bool = True
    config: Annotated[Path | None, cyclopts.Parameter(env_var=CONFIG_VARIABLE)] = None

    def worker_config(self) -> WorkerConfig:
        """The part that the service takes."""
        shared = {f.name: getattr(self, f.name) for f in fields(WorkerConfig) if f.name not in _MADE}
        return WorkerConfig(
            **shared,
            credentials=credentials_of(self.key, self.controller_key),
            record=recording_of(self.record, self.record_bytes_max, self.record_ms_max),
        )


#: Fields of the service's configuration that are made of several settings.
_MADE: Final = ("credentials", "record")
_SETTINGS: Final = frozenset(f.name for f in fields(WorkerSettings))
#: The annotation of whatever a backend parses by itself.
_REST: Final = Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True, help="Arguments of the backend's own.")]


def segments(arguments: Sequence[str]) -> list[list[str]]:
    """The command line of each backend."""
    segments: list[list[str]] = [[]]
    for argument in arguments:
        if argument == AND:
            segments.append([])
        else:
            segments[-1].append(argument)
    return segments


def _backend_name(segment: Sequence[str], arguments: Sequence[str]) -> str:
    """The backend has to be known before its options can be parsed: flag, then environment, then file."""
    for position, argument in enumerate(segment):
        if argument == "--backend" and position + 1 < len(segment):
            return segment[position + 1]
        if argument.startswith("--backend="):
            return argument.partition("=")[2]
    if "ZFABRIC_WORKER_BACKEND" in os.environ:
        return os.environ["ZFABRIC_WORKER_BACKEND"]
    return str(_file_table(arguments).get("backend", "echo"))


def _refuse_settings(segment: Sequence[str]) -> None:
    """Settings of the process have one place: before the first --and.

    Raises:
        ConfigurationError: One stands after it, where it would mean nothing.
    """
    names = {name.replace("_", "-") for name in _SETTINGS} - {"backend"}
    for argument in segment:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and (name in names or name.removeprefix("no-") in names):
            raise ConfigurationError(f"--{name} is a setting of the whole process: it belongs before the first {AND}")


def _file_table(arguments: Sequence[str]) -> dict[str, Any]:
    path = config_file(arguments, "worker")
    return {} if path is None else read_section(path, "worker")


def _parser(segment: Sequence[str], arguments: Sequence[str]) -> cyclopts.App:
    """A parser for one backend: the worker's own settings, and what the backend takes.

    That is one of three: the fields of the dataclass that it names `Options`, and is made from; anything, which a
    classmethod `from_arguments(argv, settings)` makes one from, `settings` being what the file's table holds beside the
    worker's own; or nothing.
    """
    kind: Any = backend_class(_backend_name(segment, arguments))
    options: Any = getattr(kind, "Options", None)
    from_arguments = getattr(kind, "from_arguments", None)
    table = _file_table(arguments) if from_arguments is not None else {}
    left_over = {key: value for key, value in table.items() if key not in _SETTINGS}
    app = make_app("zfabric-worker", HELP, "worker", arguments, shared=left_over)

    def worker(*rest: str, **given: Any) -> tuple[WorkerSettings, Callable[[], BaseModelWorker]]:
        # What is not set at all is not passed.
        settings = given.get("settings") or WorkerSettings()
        if from_arguments is not None:
            return settings, lambda: from_arguments(rest, left_over)
        made = given.get("options") or (options() if options is not None else None)
        return settings, (lambda: kind(made)) if made is not None else kind

    flat = cyclopts.Parameter(name="*")
    parameters = [_keyword("settings", Annotated[WorkerSettings, flat], WorkerSettings())]
    if from_arguments is not None:
        parameters.insert(0, inspect.Parameter("rest", inspect.Parameter.VAR_POSITIONAL, annotation=_REST))
    elif options is not None and is_dataclass(options):
        parameters.append(_keyword("options", Annotated[options, flat], _default(options)))
    worker.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    worker.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.default(worker)
    return app


def _default(options: Any) -> Any:
    """The options' default, or none where something has to be given."""
    try:
        return options()
    except TypeError:
        return inspect.Parameter.empty


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def build(arguments: list[str]) -> cyclopts.App:
    """The parser of the whole line. Only the first segment's worker settings count."""
    first, *others = segments(arguments)
    app = _parser(first, arguments)

    def start(parsed: Any) -> int:
        if not isinstance(parsed, tuple):
            return 0
        settings, make = parsed
        makers = [make]
        for segment in others:
            _refuse_settings(segment)
            parsed = _parser(segment, arguments)(segment)
            if not isinstance(parsed, tuple):
                return 0
            makers.append(parsed[1])
        return run(serve(settings, makers, settings.worker_config()), use_uvloop=settings.uvloop)

    app.result_action = start
    return app


async def serve(settings: WorkerSettings, makers: Sequence[Callable[[], BaseModelWorker]], config: WorkerConfig) -> int:
    """Run until drained."""
    log = make_logger("worker", settings.log_level, settings.log_format).bind(worker=settings.name)
    served: dict[str, str] = {}

    def on_ready(models: list[ModelInfo]) -> None:
        names = ",".join(name for info in models for name in (info.name, *info.aliases))
        ready(worker=settings.name, models=names, **served)

    told = events(log)
    async with traces_to(settings.traces, "zfabric-worker", told, settings.name) as provider:
        service = WorkerService(
            [make() for make in makers],
            config,
            log=told,
            on_ready=on_ready,
            traces=_sink(provider, settings.name),
        )
        return await _run(service, settings, log, served)


def _sink(provider: TracerProvider | None, name: str) -> Traces | None:
    if provider is None:
        return None
    from zfabric.tracing.worker import WorkerTraces

    return WorkerTraces(provider, name)


async def _run(service: WorkerService, settings: WorkerSettings, log: Any, served: dict[str, str]) -> int:
    """Run a service until it was drained. Args: served: Gets what is told when it is ready."""

    async def drain() -> None:
        await service.drain()
        # `run` returns now, unless an engine does not end, or is still loading in a thread that nobody can stop.
        await asyncio.sleep(settings.close_ms / 1_000)
        log.warning("close_limit_reached", limit_s=settings.close_ms / 1_000)
        leave(0)

    on_signals(drain)
    on_hangup(service.reload)
    with metrics_at(settings.metrics, "worker", service) as url:
        served.update(url)
        try:
            await service.run()
        except ImportError as error:
            raise ConfigurationError(_missing(settings.backend, error), backend=settings.backend) from error
    return 0


def _missing(backend: str, error: ImportError) -> str:
    """What to install."""
    extra = _EXTRAS.get(backend)
    advice = f"; install it with: pip install '{extra}'" if extra else ""
    return f"backend {backend!r} needs a module that is not there: {error}{advice}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_app(lambda _: build(given), segments(given)[0])


if __name__ == "__main__":
    raise SystemExit(main())
