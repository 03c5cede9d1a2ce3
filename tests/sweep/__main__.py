"""Sweep the architectures of the installed transformers: python -m tests.sweep [--only NAME …] [--kind KIND …] [--table FILE].

Each is examined in a process of its own, with bounded memory and time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.sweep.overrides import OVERRIDES
from tests.sweep.page import page
from tests.sweep.subject import Finding, Kind, examine

#: A tiny model of 20 M parameters and torch itself fit well; a mistake in its sizes does not.
_MEMORY_BYTES = 12 * 1024**3
_SECONDS = 150


def architectures(kind: Kind) -> list[str]:
    """Names of one kind, as transformers' own tables have them."""
    from transformers.models.auto import modeling_auto as tables

    causal = tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    vision = tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    paired = tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    encoders = {**tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES, **tables.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    tables_of: dict[Kind, Any] = {"causal": causal, "vision": vision, "paired": paired, "encoder": encoders}
    names = set(tables_of[kind])
    if kind == "causal":
        names |= {name for name in OVERRIDES if name.endswith("+decoder")}
    return sorted(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these architectures")
    parser.add_argument("--kind", choices=["causal", "vision", "paired", "encoder"], nargs="*")
    parser.add_argument("--table", type=Path, help="write the findings there, as docs/architectures.md has them")
    arguments = parser.parse_args()
    kinds: list[Kind] = arguments.kind or ["causal", "vision", "paired", "encoder"]
    findings: list[Finding] = []
    for kind in kinds:
        for name in architectures(kind):
            if arguments.only and name not in arguments.only:
                continue
            finding = in_a_process(name, kind)
            findings.append(finding)
            print(f"{finding.verdict:9} {kind:8} {name:28} {finding.reason}", flush=True)
    if arguments.table:
        arguments.table.write_text(page(findings))
    wrong = [finding for finding in findings if finding.verdict == "wrong"]
    print(f"{len(findings)} architectures, {len(wrong)} wrong", flush=True)
    return 1 if wrong else 0


def in_a_process(name: str, kind: Kind) -> Finding:
    """Examine one, and end its process whatever it does."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(sender, name, kind), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(_SECONDS):
            return Finding(*receiver.recv())
        return Finding(name, kind, "wrong", f"no answer within {_SECONDS} s")
    except EOFError:
        process.join()
        return Finding(name, kind, "wrong", f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _child(sender: Connection, name: str, kind: Kind) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sender.send(tuple(examine(name, kind)))


if __name__ == "__main__":
    raise SystemExit(main())
