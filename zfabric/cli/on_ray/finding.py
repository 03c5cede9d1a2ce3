"""The controller's endpoint on a Ray cluster, kept in a file for whoever connects to it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from zfabric.cli.on_ray.cluster import CONTROLLER, found
from zfabric.fleet.limits import RAY_AGAIN_MS


async def keep_endpoint(namespace: str, file: Path) -> None:
    """Keep a file up to date that holds the controller's endpoint, until this call is cancelled.

    The controller's actor is found by its name. It answers when it has another endpoint than the file, so that a controller
    that has moved to another node is known at once.
    """
    from ray.exceptions import RayError

    known = ""
    while True:
        try:
            actor = await found(CONTROLLER, namespace)
            if actor is not None:
                endpoint = await actor.endpoint_beside.remote(known)
                if endpoint != known:
                    write(file, endpoint)
                    known = endpoint
                continue
        except (RayError, OSError, RuntimeError):
            # It is on its way to another node, or was ended; or the head of the cluster is, or a disk is full.
            pass
        await asyncio.sleep(RAY_AGAIN_MS / 1_000)


def write(file: Path, text: str) -> None:
    """Have a file hold a text, of which nobody reads a part."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
