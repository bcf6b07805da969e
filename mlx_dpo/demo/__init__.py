"""The whole job on the model that ships: convert, train, evaluate, compare."""
