"""HuggingfaceApiWorker: servers that speak the Hugging Face or OpenAI API, behind the fabric (docs/backends.md)."""
