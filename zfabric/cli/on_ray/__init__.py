"""A fleet on a Ray cluster: an actor for each process, and what starts, finds, scales and ends them."""
