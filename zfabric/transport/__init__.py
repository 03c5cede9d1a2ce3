"""How bytes move: the only user of pyzmq."""
