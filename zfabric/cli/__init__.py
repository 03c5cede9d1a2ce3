"""How it is started: arguments, environment and a file become configuration, and a service runs on it."""
