"""Hostile bytes at every door, in this process. `make fuzz` runs millions of them, guided by the code that they reach."""
