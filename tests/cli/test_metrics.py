"""What daemons serve under /metrics, as a scraper reads it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.errors import ConfigurationError, EndpointInUseError, FabricError
from zfabric.monitoring.endpoint import MetricsEndpoint, parse_address

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ROOT / "docs" / "monitoring"
CONTROLLER, GATEWAY, WORKER = "zfabric.cli.controller", "zfabric.cli.gateway", "zfabric.cli.worker"
_OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


Figures = dict[str, dict[frozenset[str], float]]


def scraped(url: str) -> Figures:
    """All samples, by name and by the values of their labels. Whoever asks for OpenMetrics has to get what parses as such."""
    asked = urllib.request.Request(url, headers={"Accept": _OPEN_METRICS})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    found: Figures = {}
    for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
        found.setdefault(f"{family.name}_total" if family.type == "counter" else family.name, {})
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.values())] = sample.value
    return found


def value(figures: Figures, name: str, *labels: str) -> float:
    return figures[name][frozenset(labels)]


def url_of(line: str) -> str:
    (url,) = re.findall(r"metrics=(\S+)", line)
    return str(url)


async def test_a_fabric_that_worked_says_so_in_figures(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, "--metrics", "0", directory=run_directory)
        children.append(controller)
        at_controller = url_of(await controller.ready())
        worker = await Process.start(
            WORKER, "--endpoint", ipc, "--name", "w", "--metrics", "127.0.0.1:0", directory=run_directory
        )
        children.append(worker)
        at_worker = url_of(await worker.ready())
        async with AsyncClient(ipc) as client:
            for _ in range(3):
                await client.generate("echo", "one two three")
            with pytest.raises(FabricError):
                await client.generate("nobody-serves-this", "one")
        figures = await asyncio.to_thread(scraped, at_controller)
        assert value(figures, "zfabric_requests_total", "echo", "completed") == 3
        ended = [value(figures, "zfabric_requests_total", "other", outcome) for outcome in ("rejected", "failed")]
        assert sum(ended) == 1
        assert value(figures, "zfabric_request_queue_time_seconds_count", "echo") == 3
        assert value(figures, "zfabric_e2e_request_latency_seconds_bucket", "echo", "+Inf") == 3
        assert value(figures, "zfabric_dispatches_total", "shortest_queue", "chosen") == 3
        assert value(figures, "zfabric_workers", "ready") == 1
        assert value(figures, "zfabric_worker_slots", "w") > 0
        assert value(figures, "process_cpu_seconds_total") > 0
        assert value(figures, "zfabric_transport_connections") >= 1
        engine = await asyncio.to_thread(scraped, at_worker)
        assert value(engine, "zfabric_worker_units_total") >= 9
        assert value(engine, "zfabric_loop_lag_seconds_count") > 0
        assert value(engine, "zfabric_time_to_first_token_seconds_count", "echo") == 3
        assert value(engine, "zfabric_inter_token_latency_seconds_count", "echo") == 3 * 255
        assert value(engine, "zfabric_generation_tokens_total", "echo") == 3 * 256
        for party in (figures, engine):
            assert value(party, "zfabric_transport_received_bytes_total") > 0
            assert value(party, "zfabric_transport_sent_bytes_total") > 0
        # A client and a worker that say goodbye are not lost.
        assert value(figures, "zfabric_peers_lost_total", "client") == 0
        assert value(figures, "zfabric_peers_left_total", "client") == 1
        gateway = await Process.start(
            GATEWAY, "--endpoint", ipc, "--port", "0", "--metrics", "0", directory=run_directory
        )
        children.append(gateway)
        line = await gateway.ready()
        (base,) = re.findall(r" url=(\S+)", line)
        async with httpx.AsyncClient(base_url=base) as web:
            asked: dict[str, Any] = {"model": "echo", "prompt": "a b", "max_tokens": 5}
            for change in ({}, {"stream": True}, {"model": "nobody"}, {"suffix": "x"}):
                await web.post("/v1/completions", json=asked | change)
            await web.get("/v1/nothing")
        door = await asyncio.to_thread(scraped, url_of(line))
        path = "/v1/completions"
        counted = door["zfabric_gateway_requests_total"]
        assert counted == {
            frozenset((path, "echo", "200")): 2, frozenset((path, "other", "404")): 1, frozenset((path, "echo", "400")): 1,
            frozenset(("other", "404")): 1,
        }  # fmt: skip
        assert value(door, "zfabric_gateway_request_seconds_count", path) == 4
        assert value(door, "zfabric_gateway_time_to_first_token_seconds_count", "echo") == 2
        assert value(door, "zfabric_gateway_time_per_output_token_seconds_count", "echo") == 2
        assert value(door, "zfabric_gateway_tokens_total", "echo", "completion") == 10
        assert value(door, "zfabric_gateway_tokens_total", "echo", "prompt") == 4
        assert value(door, "zfabric_gateway_streams") == value(door, "zfabric_gateway_disconnects_total") == 0
        assert value(door, "zfabric_gateway_body_bytes_total", "sent") > 500
        metrics_in_files = {name for path in OPERATIONS.iterdir() for name in names_in(path.read_text())}
        assert metrics_in_files
        assert metrics_in_files <= figures.keys() | engine.keys() | door.keys()


def names_in(text: str) -> set[str]:
    """Metrics that queries name."""
    return set(re.findall(r"\b(?:zfabric|process)_[a-z0-9_]+\b", text))


def test_the_dashboard_is_one() -> None:
    board: dict[str, Any] = json.loads((OPERATIONS / "dashboard.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 8
    for panel in panels:
        assert panel["title"]
        assert all(target["expr"] for target in panel["targets"])


def test_alerts_say_what_to_do() -> None:
    yaml = pytest.importorskip("yaml")
    groups = yaml.safe_load((OPERATIONS / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    for rule in rules:
        assert rule["expr"]
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "here", "host:", "host:99999", "::1:9464", "9464:here", "-1"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no address for metrics"):
        parse_address(text)


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EndpointInUseError, match=str(port)):
            MetricsEndpoint(("127.0.0.1", port), list)


async def test_a_scrape_that_fails_harms_nobody() -> None:
    def broken() -> list[Any]:
        raise RuntimeError("no figures today")

    with MetricsEndpoint(("127.0.0.1", 0), broken) as endpoint, pytest.raises(urllib.error.HTTPError):
        await asyncio.to_thread(scraped, endpoint.url)
