"""The worker's machine: its session with the controller, and the answers that it owes."""
