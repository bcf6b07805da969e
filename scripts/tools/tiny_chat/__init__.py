"""Build of the shipped model: corpus, tokenizer, weights and preference pairs."""
