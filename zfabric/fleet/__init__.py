"""The file that says which processes make up a fleet."""
