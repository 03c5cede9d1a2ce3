"""What happens: pure state machines without a socket, a clock or chance of their own."""
