"""One engine of vLLM's for several front ends, so that nothing but the front ends differs between measurements.

Two engines of equal settings, each a process of its own, compute 5 % apart, by where their memory happens to lie. vLLM's
own server has several processes share an engine; here they are unlike each other.

Usage, in a process of its own: python -m bench.engines.vllm_shared PLACE MODULE ARGUMENTS …
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def shared_engine(arguments: Any, directory: Path, places: int) -> Iterator[list[dict[str, Any]]]:
    """The process of an engine, up and running, that so many front ends can attach to.

    Args:
        arguments: `AsyncEngineArgs`.
        directory: Where its sockets are.
    """
    from vllm.v1.engine.utils import EngineZmqAddresses, launch_core_engines
    from vllm.v1.executor import Executor

    configuration = arguments.create_engine_config()
    inputs, outputs = ([f"ipc://{directory}/{kind}{n}" for n in range(places)] for kind in ("in", "out"))
    addresses = EngineZmqAddresses(inputs=inputs, outputs=outputs)
    # At the end of this block the engine is up.
    with launch_core_engines(configuration, Executor.get_class(configuration), True, addresses) as launch:
        pass
    try:
        yield [
            {"addresses": {"input_address": given, "output_address": taken}, "count": places, "index": index}
            for index, (given, taken) in enumerate(zip(inputs, outputs, strict=True))
        ]
    finally:
        launch.engine_manager.shutdown()


def attach(place: dict[str, Any]) -> None:
    """Have every `AsyncLLM` that this process makes use the engine at this place instead of starting one."""
    from vllm.v1.engine.async_llm import AsyncLLM

    made = AsyncLLM.__init__

    def make(self: Any, *arguments: Any, **options: Any) -> None:
        options |= {
            "client_addresses": place["addresses"], "client_count": place["count"], "client_index": place["index"],
        }  # fmt: skip
        made(self, *arguments, **options)

    AsyncLLM.__init__ = make


def main() -> None:
    place, module = json.loads(sys.argv[1]), sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    attach(place)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
