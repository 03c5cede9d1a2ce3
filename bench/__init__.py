"""The benchmark suite: what zfabric costs, beside everything that could be used instead."""
