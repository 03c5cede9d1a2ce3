"""From the logits of a step to tokens, computed where the logits are."""
