"""Flight recordings: kept by a running controller or worker, and read afterwards."""
