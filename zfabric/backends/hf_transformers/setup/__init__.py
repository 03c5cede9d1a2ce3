"""All of an engine put together, in this process and in those of further ranks."""
