"""A run on several ranks: what they must have in common, and what only rank 0 reads and writes."""
