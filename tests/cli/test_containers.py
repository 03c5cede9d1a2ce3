"""The Dockerfile and compose.yaml, as far as they can be looked at without a daemon of Docker's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from zfabric.cli import controller, gateway, main, worker

ROOT = Path(__file__).resolve().parents[2]
BUILDERS: dict[str, Any] = {
    "zfabric": main.build,
    "zfabric-controller": controller.build,
    "zfabric-gateway": gateway.build,
    "zfabric-worker": worker.build,
}


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return found


def check_command(name: str, *arguments: str) -> None:
    """The project's own parser takes it: an unknown flag raises."""
    BUILDERS[name](list(arguments)).parse_args(list(arguments), print_error=False, exit_on_error=False)


def run(program: str, *arguments: str) -> str:
    """What a checker says. Its exit code says that it found nothing."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_dockerfile_is_clean() -> None:
    assert run("hadolint", "Dockerfile") == ""


def test_the_compose_file_keeps_to_its_schema() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_all_commands_are_what_the_parsers_take(services: dict[str, dict[str, Any]]) -> None:
    commands = [service["command"] for service in services.values() if "command" in service]
    commands += [service["healthcheck"]["test"][1:] for service in services.values() if "healthcheck" in service]
    commands += [
        json.loads(line[line.index("[") :])
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if "CMD [" in line
    ]
    own = [command for command in commands if command[0] in BUILDERS]
    assert len(own) == len(commands) - 1 == 6
    for command in own:
        check_command(*command)


def test_what_is_copied_and_mounted_is_there(services: dict[str, dict[str, Any]]) -> None:
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    for path in (path for path in mounted if path.startswith("./")):
        assert (ROOT / path).is_file(), path
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            assert [path for path in line.split()[1:-1] if not (ROOT / path).exists()] == []
    assert (ROOT / "requirements" / "core.txt").exists()
    assert (ROOT / "requirements" / "demo.txt").exists()


def test_prometheus_scrapes_the_ports_that_the_daemons_are_given(services: dict[str, dict[str, Any]]) -> None:
    jobs = yaml.safe_load((ROOT / "packaging" / "compose" / "prometheus.yml").read_text())["scrape_configs"]
    (job,) = jobs
    assert "--metrics=0.0.0.0:9464" in services["controller"]["command"]
    assert job["static_configs"][0]["targets"] == ["controller:9464"]
    assert f"--metrics=0.0.0.0:{job['dns_sd_configs'][0]['port']}" in services["worker"]["command"]
