"""PyTorch models through transformers: continuous batching, per-request sampling, embeddings."""
