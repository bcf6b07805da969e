"""Chat templates: render messages, and find out what a template takes and what it leaves out."""
