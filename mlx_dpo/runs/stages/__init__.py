"""Training in stages: instruction tuning, then preferences, each stage a run of its own."""
