"""Consoles, the status of long phases and the display of training steps."""
