"""Guesses at what a row goes on with, and how many of them are worth computing."""
