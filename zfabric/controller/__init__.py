"""The controller: the broker core driven over one ROUTER socket."""
