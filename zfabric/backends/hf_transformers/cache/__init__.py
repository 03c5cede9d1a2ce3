"""Keys, values and states of rows: blocks and tables, and attention over them."""
