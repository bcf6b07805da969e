"""How the model that ships with the project is made: text, tokenizer, weights, preferences."""
