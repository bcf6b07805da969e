"""Batches of tokenized pairs: order, micro-batches, token counts, collation and metadata."""
