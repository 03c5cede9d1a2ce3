"""Which rows a step computes, in what order, and what becomes of them."""
