"""The worker side: the base class of backends, and the service that connects one to the fabric."""
