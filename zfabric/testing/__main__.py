"""python -m zfabric.testing: see `zfabric.testing.runner`, which worker processes can import by its own name."""

from zfabric.testing.runner import main

if __name__ == "__main__":
    raise SystemExit(main())
