"""Checks on data sets: unreadable rows, duplicates, leaks, odd texts, lengths."""
