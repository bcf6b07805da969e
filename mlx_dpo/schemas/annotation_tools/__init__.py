"""Schemas of the files that annotation tools and chat programs export with people's judgements."""
