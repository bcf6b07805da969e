"""Parts of the study `on_policy`: runs of iterative and of offline DPO."""
