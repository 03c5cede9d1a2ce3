"""The gateway beside vLLM's own OpenAI server: the same requests to both, and a page of every difference."""
