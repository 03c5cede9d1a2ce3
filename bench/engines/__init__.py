"""What each engine makes of a model, without a fabric around it."""
