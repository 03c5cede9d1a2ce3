"""One forward pass: a step's inputs to its logits, by the kinds of models."""
