"""Options that commands of `zfabric` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from zfabric.cli.settings import CONFIG_VARIABLE

Endpoint = Annotated[
    str | None, cyclopts.Parameter(help="The controller's endpoint; of several, with commas between them.")
]
Transport = Annotated[str | None, cyclopts.Parameter(help="The driver of the socket: libzmq or loop.")]
Json = Annotated[bool, cyclopts.Parameter(name="--json", negative=(), help="Print JSON instead of a table.")]
Config = Annotated[
    Path | None, cyclopts.Parameter(env_var=CONFIG_VARIABLE, help="TOML file; its [client] table holds defaults.")
]
Text = Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True, help="The prompt; - reads it from standard input.")]
Timeout = Annotated[
    float | None, cyclopts.Parameter(help="Seconds to wait for the controller's answer; 10 by default.")
]
Watch = Annotated[float | None, cyclopts.Parameter(help="Show it again after so many seconds, until Ctrl-C ends it.")]
