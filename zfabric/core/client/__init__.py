"""The client's machine: its session with the controller, and the requests that it waits for."""
