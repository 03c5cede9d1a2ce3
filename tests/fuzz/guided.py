"""One target under a fuzzer that is guided by the code that inputs reach. A process of its own: a finding ends it."""

from __future__ import annotations

import sys
import traceback

import atheris


def main() -> None:
    """`python -m tests.fuzz.guided TARGET …`, with libFuzzer's own arguments behind the name."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["zfabric"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except Exception:
            traceback.print_exc()
            raise

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
