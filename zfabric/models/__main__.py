"""python -m zfabric.models NAME: prints the directory of a model, which is prepared first if need be."""

from __future__ import annotations

import sys

from zfabric.errors import FabricError
from zfabric.models.wheels import prepare


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(prepare(sys.argv[1], lambda text: print(f"── {text}", file=sys.stderr, flush=True)))
    except FabricError as error:
        print(f"error {error.code}: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
