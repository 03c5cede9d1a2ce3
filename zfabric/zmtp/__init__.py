"""ZMTP 3.1, the wire protocol of ZeroMQ, without input or output: bytes in, events and bytes out."""
