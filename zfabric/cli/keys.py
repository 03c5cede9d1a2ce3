"""Key pairs: keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts
from rich.console import Console

from zfabric.cli.options import Config, Json
from zfabric.cli.tables import print_json
from zfabric.transport.curve import create_keys


def keys(
    name: str,
    /,
    *,
    directory: Annotated[Path, cyclopts.Parameter(help="Where the two files go.")] = Path(),
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Make a key pair: NAME.key for a keyring, or for whoever dials a controller, and NAME.key_secret to keep.

    **Examples**

    `zfabric keys backend-1` · `zfabric keys gpu --directory /etc/zfabric`
    """
    public, secret = create_keys(directory, name)
    if as_json:
        print_json({"public": str(public), "secret": str(secret)})
        return
    Console().print(f"public key {public}\nsecret key {secret}", highlight=False, soft_wrap=True)
