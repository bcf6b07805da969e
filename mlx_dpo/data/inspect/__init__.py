"""Checks of data sets: unreadable rows, duplicates, leaks, odd texts, lengths."""
