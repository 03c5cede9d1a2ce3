"""Models served by vLLM's asynchronous engine. Nothing here imports vLLM before a worker loads."""
