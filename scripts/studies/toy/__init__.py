"""Toy models whose tokens are words, so that all of their answers can be enumerated."""
