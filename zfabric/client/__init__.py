"""The client library: asyncio and blocking."""
