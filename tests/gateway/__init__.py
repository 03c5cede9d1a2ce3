"""The HTTP door: in process, on a real socket, with OpenAI's own client."""
