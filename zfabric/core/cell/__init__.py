"""A controller as one worker of another: what it announces, and whose requests it serves so."""
