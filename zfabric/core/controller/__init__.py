"""The controller's machine: who is there, what waits, where it runs, and how it ends."""
