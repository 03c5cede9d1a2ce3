"""What must not be told is not: all four daemons run with marked secrets, and all that they log is searched."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx

from tests.fabric import Process, processes
from tests.keys import credentials, make_keys
from zfabric import AsyncClient
from zfabric.errors import FabricError
from zfabric.transport.curve import load_public, load_secret

CONTROLLER, WORKER, GATEWAY = "zfabric.cli.controller", "zfabric.cli.worker", "zfabric.cli.gateway"
KEYRING = '[one]\nrole = "client"\nkey = "one.key"\n[gpu]\nrole = "worker"\nkey = "gpu.key"\n'
PROMPT, TOKEN = "marked-prompt-of-a-person", "sk-marked-token-of-a-caller"


async def test_no_log_line_holds_a_prompt_a_token_or_a_key(ipc: str, run_directory: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path, ("controller", "one", "gpu", "stranger"), KEYRING)
    (tmp_path / "api.toml").write_text(f'[caller]\nkey = "{TOKEN}"\n')
    async with processes(run_directory) as children:

        async def start(module: str, *arguments: str) -> str:
            child = await Process.start(module, "--endpoint", ipc, *arguments, directory=run_directory)
            children.append(child)
            return await child.ready()

        def shows(name: str) -> list[str]:
            return ["--key", str(keys / f"{name}.key_secret"), "--controller-key", str(keys / "controller.key")]

        await start(CONTROLLER, "--key", str(keys / "controller.key_secret"), "--keyring", str(keys / "keyring.toml"))
        await start(WORKER, *shows("gpu"), "--backend", "echo")
        ready = await start(GATEWAY, *shows("one"), "--port", "0", "--api-keys", str(tmp_path / "api.toml"))
        url = dict(word.partition("=")[::2] for word in ready.split()[1:])["url"]
        told: list[str] = []
        async with httpx.AsyncClient(base_url=url, timeout=60) as web:
            for secret in (TOKEN, f"{TOKEN}-wrong"):
                for model in ("echo", "nobody"):
                    chat = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": PROMPT}]}
                    headers = {"authorization": f"Bearer {secret}"}
                    told.append((await web.post("/v1/chat/completions", json=chat, headers=headers)).text)
        assert PROMPT in told.pop(0)
        for name in ("one", "stranger"):
            async with AsyncClient(ipc, credentials=credentials(keys, name), label=name) as client:
                for model in ("echo", "nobody"):
                    try:
                        await client.generate(model, PROMPT, max_new_tokens=4)
                    except FabricError as error:
                        told.append(repr(error))
        for child in reversed(children):
            child.kill(signal.SIGTERM)
            assert await child.ended() == 0
        told += [child.log.read_text() for child in children]
    secrets = [
        load_secret(keys / f"{name}.key_secret").secret.decode() for name in ("controller", "one", "gpu", "stranger")
    ]
    publics = [load_public(keys / f"{name}.key").decode() for name in ("one", "gpu", "stranger")]
    assert all(told[-3:]), "each daemon has logged"
    for text in told:
        assert [secret for secret in (PROMPT, TOKEN, *secrets, *publics) if secret in text] == []
