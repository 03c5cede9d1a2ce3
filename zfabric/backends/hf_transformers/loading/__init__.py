"""A model from its files, and the memory it may take."""
