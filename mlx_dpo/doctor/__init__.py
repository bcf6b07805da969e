"""Self-test of this machine: facts about it (`machine`) and numerical checks (`checks`)."""
