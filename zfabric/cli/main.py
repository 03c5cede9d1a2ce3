"""zfabric: look at a fabric, talk to it, and operate it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields

import cyclopts

from zfabric.cli.answers import chat, count, embed, generate
from zfabric.cli.app import make_app, run_app
from zfabric.cli.check import check
from zfabric.cli.doctor import doctor
from zfabric.cli.explain import explain
from zfabric.cli.keys import keys_list, keys_make, keys_remove, keys_rotate
from zfabric.cli.look import clients, models, queue, requests, scaling, status, workers
from zfabric.cli.on_ray.commands import ray_down, ray_endpoint, ray_status, ray_up
from zfabric.cli.ping import ping
from zfabric.cli.replay import replay
from zfabric.cli.sampling import AnswerFlags
from zfabric.cli.serve import serve
from zfabric.cli.steer import cancel, config_get, config_set, drain, kick, operate, pause, resume, undrain
from zfabric.cli.top import top
from zfabric.cli.up import up

HELP = """Look at a fabric, talk to it, and operate it.

**Examples**

`zfabric serve ./SmolLM2-135M-Instruct` · `zfabric up fleet.toml` · `zfabric ray up fleet.toml`

`zfabric models` · `zfabric workers --json` · `zfabric status`

`zfabric top` shows all of that live

`zfabric queue` · `zfabric requests --state queued --sort place` · `zfabric clients` · `zfabric explain 2f1c66ab01d4e3f0`

`zfabric generate chat "The capital of France is" --max-new-tokens 16 --temperature 0`

`zfabric chat smollm2` · `zfabric embed minilm "one text" "another" --json`

`zfabric drain worker-7` · `zfabric pause smollm2` · `zfabric cancel 2f1c66ab01d4e3f0` · `zfabric config get`

`zfabric ping --quiet` · `zfabric check zfabric.toml` · `zfabric doctor` · `zfabric keys list --keyring keyring.toml`

The controller is the one of --endpoint, $ZFABRIC_ENDPOINT, or this host's default. Other settings come from flags, then
ZFABRIC_CLIENT_… variables, then the [client] table of a TOML file, which all commands share. For a controller with
keys, $ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY name this side's secret key file and the controller's public one.
"""


_COMMANDS: Sequence[Callable[..., int | None]] = (
    models, workers, status, requests, clients, queue, explain, scaling, generate, chat, embed, count, drain, undrain, pause,
    resume, cancel, kick, operate, ping, check, doctor, replay, serve, top, up,
)  # fmt: skip
#: Those of `zfabric config`.
_CONFIG: dict[str, Callable[..., int | None]] = {"get": config_get, "set": config_set}
#: Those of `zfabric keys`.
_KEYS: dict[str, Callable[..., int | None]] = {
    "make": keys_make,
    "list": keys_list,
    "rotate": keys_rotate,
    "remove": keys_remove,
}
#: Those of `zfabric ray`.
_RAY: dict[str, Callable[..., int | None]] = {
    "up": ray_up,
    "status": ray_status,
    "endpoint": ray_endpoint,
    "down": ray_down,
}
_GROUPS = {
    "config": ("Settings of the running controller: get, set.", _CONFIG),
    "keys": ("Keys, and the keyring of a controller: make, list, rotate, remove.", _KEYS),
    "ray": ("A fleet on a Ray cluster: up, status, endpoint, down.", _RAY),
}


def build(arguments: list[str]) -> cyclopts.App:
    """The parser with all commands."""
    app = make_app("zfabric", HELP, "client", arguments, shared=client_options())
    for command in _COMMANDS:
        app.command(command)
    for group, (told, commands) in _GROUPS.items():
        below = cyclopts.App(name=group, help=told)
        for name, command in commands.items():
            below.command(command, name=name)
        app.command(below)
    return app


def client_commands() -> list[tuple[list[str], Callable[..., int | None]]]:
    """All commands, and the words that call them."""
    plain = [([command.__name__], command) for command in _COMMANDS]
    return plain + [
        ([group, name], command) for group, (_, commands) in _GROUPS.items() for name, command in commands.items()
    ]


def client_options() -> set[str]:
    """Keys that the [client] table may have: the options of any command."""
    names = {
        parameter.name
        for _, command in client_commands()
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return {"json", *(f.name for f in fields(AnswerFlags)), *(names - {"as_json", "answer"})}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_app(build, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
