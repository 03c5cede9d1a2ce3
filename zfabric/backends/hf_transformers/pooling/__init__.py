"""Vectors, scores and labels instead of text."""
