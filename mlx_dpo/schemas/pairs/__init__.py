"""Schemas of rows with a preference pair, or with several answers of which pairs are made."""
