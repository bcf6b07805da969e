"""The demo on the shipped model: convert, train, evaluate, compare."""
