"""Programs of others, unmodified, against `zfabric serve` on a real model. Most run with `make test-clients` alone."""
